"""What people pass for a config is taken where it is obvious, else refused in one line that names it."""

import re

import numpy as np
import pytest

import draftdiff
from draftdiff import DraftAttentionConfig
from draftdiff.attention.rule import Rule
from draftdiff.core.budget import Budget
from tests.video.model_cases import MODEL_CASES, output_of, tiny_wan


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, DraftAttentionConfig()),
        (0.8, DraftAttentionConfig(sparsity=0.8)),
        (0, DraftAttentionConfig(sparsity=0)),
        (np.float32(0.5), DraftAttentionConfig(sparsity=0.5)),
        (Budget(0.6, steps=(2.0, 1.0)), DraftAttentionConfig(Budget(0.6, steps=(2.0, 1.0)))),
        ([0.4, 0.8], DraftAttentionConfig(sparsity=(0.4, 0.8))),
        ({"sparsity": 0.9, "tile": [1, 8, 8]}, DraftAttentionConfig(sparsity=0.9, tile=(1, 8, 8))),
        (DraftAttentionConfig(tail=False), DraftAttentionConfig(tail=False)),
    ],
)
def test_what_stands_for_a_config_is_taken(value, expected):
    assert DraftAttentionConfig.of(value) == expected
    draftdiff.disable(draftdiff.enable(tiny_wan(layers=2)(), value))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tile": [1, 8, 8]}, ("tile", (1, 8, 8))),
        ({"dense_layers": [0, 1]}, ("dense_layers", (0, 1))),
        ({"dense_steps": np.int64(3)}, ("dense_steps", 3)),
        ({"min_tokens": np.int32(5)}, ("min_tokens", 5)),
        ({"dense_above": 1}, ("dense_above", 1)),
    ],
)
def test_lists_and_numbers_of_other_libraries_are_pythons(fields, expected):
    name, value = expected
    found = getattr(DraftAttentionConfig(**fields), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0.8", "config must be a DraftAttentionConfig, a sparsity or a dict of"),
        (True, "config must be a DraftAttentionConfig, a sparsity or a dict of"),
        (["0.8"], "sparsity must be at least 0 and below 1, got '0.8'"),
        (1.5, "sparsity must be at least 0 and below 1, got 1.5"),
        (float("nan"), "sparsity must be at least 0 and below 1, got nan"),
        ({"sparsety": 0.8}, "config has no field sparsety; fields are sparsity, selection"),
    ],
)
def test_what_is_no_config_is_refused_by_enable_and_nothing_is_changed(value, message):
    model = tiny_wan(layers=1)()
    stock = model.blocks[0].attn1.processor
    with pytest.raises(ValueError, match=message) as error:
        draftdiff.enable(model, value)
    assert "\n" not in str(error.value)
    assert model.blocks[0].attn1.processor is stock


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": "0.8"}, "sparsity must be of type float, int, tuple, Budget, got '0.8'"),
        ({"tail": 1}, "tail must be of type bool, got 1"),
        ({"block_size": True}, "block_size must be of type int, None, got True"),
        ({"dense_steps": None}, "dense_steps must be of type int, float, got None"),
        ({"dense_steps": 1.5}, "dense_steps must be a number of steps"),
        ({"dense_steps": -1}, "dense_steps must be a number of steps"),
        ({"dense_layers": (0, -1)}, "dense_layers must be a number of layers or a tuple of layer indices"),
        ({"dense_layers": (0, 1.5)}, "dense_layers must be a number of layers or a tuple of layer indices"),
        ({"min_tokens": -1}, "min_tokens must be 0 or more, got -1"),
        ({"dense_above": 1.1}, "dense_above must be between 0 and 1, got 1.1"),
    ],
)
def test_a_field_that_cannot_be_is_named(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        DraftAttentionConfig(**fields)
    assert "\n" not in str(error.value)


def test_the_share_of_single_tokens_is_of_the_budget():
    assert DraftAttentionConfig(0.75, tokens=0.5).rule.single == 0.125
    assert DraftAttentionConfig(0.75).rule.single == 0.0625  # a quarter
    assert DraftAttentionConfig(0.75, selection="draft").rule.single == 0
    assert DraftAttentionConfig(0.75, selection="upstream").rule.single == 0
    for fields, message in (
        ({"tokens": 1.0}, r"tokens must be a number of tokens \(int, 0 or more\) or a share .* got 1.0"),
        ({"tokens": -1}, "tokens must be a number of tokens .* got -1"),
        ({"tokens": 0.1, "selection": "upstream"}, "tokens must be 0 where selection is 'upstream', got 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            DraftAttentionConfig(**fields)


def test_sparsities_may_be_given_for_stretches_of_the_steps():
    budget = DraftAttentionConfig((0.4, 0.7, 0.7)).budget
    assert [float(budget.density(1, 1, at)) for at in (0.0, 0.3, 0.5, 0.99)] == pytest.approx([0.6, 0.6, 0.3, 0.3])
    assert budget.sparsity == pytest.approx(0.6)
    for wrong, message in (
        ((0.5, 1.0), "sparsity must be at least 0 and below 1, got 1.0"),
        ((), "sparsity must be one number or several, got ()"),
        (("0.5",), "sparsity must be at least 0 and below 1, got '0.5'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            DraftAttentionConfig(wrong)


def test_single_tokens_may_be_counted():
    rule = DraftAttentionConfig(0.75, selection="error", tokens=256).rule
    assert [rule.singles_of(tokens) for tokens in (128, 1024)] == [128, 256]
    assert DraftAttentionConfig(0.75, selection="error", tokens=0.5).rule.singles_of(128) == 16


def test_steps_stay_dense_at_both_ends():
    for fields, sparse in (
        ({}, range(2, 10)),
        ({"dense_steps": 3, "dense_end": 2}, range(3, 8)),
        ({"dense_steps": 0.3, "dense_end": 0.1}, range(3, 9)),
        ({"dense_steps": 8, "dense_end": 8}, range(0)),
    ):
        assert list(DraftAttentionConfig(**fields).sparse_steps(10)) == list(sparse)


def test_the_names_of_other_tools_are_taken():
    config = DraftAttentionConfig.of(
        {"start_percent": 0.3, "end_percent": 0.9, "dense_blocks": "0,2-4", "extra_tokens": 64, "selection": "error"}
    )
    assert list(config.sparse_steps(10)) == list(range(3, 9))
    assert config.dense_layers == (0, 2, 3, 4)
    assert config.tokens == 64
    assert DraftAttentionConfig.of({"dense_blocks": 2}).dense_layers == 2
    for given, message in (
        ({"end_percent": 90}, "end_percent must be between 0 and 1, got 90"),
        ({"dense_blocks": "0,x"}, "dense_blocks must be layers as in '0,1,38-39', got '0,x'"),
        ({"dense_steps": 3, "start_percent": 0.3}, "config gives dense_steps twice, also as start_percent"),
        ({"extra_tokens": "many"}, "tokens must be of type int, float, None, got 'many'"),
    ):
        with pytest.raises(ValueError, match=message):
            DraftAttentionConfig.of(given)


def test_the_rule_and_the_fields_of_a_config_are_those_it_was_given():
    config = DraftAttentionConfig(0.5, tail=False, block_size=64, backend="torch")
    assert config.rule == Rule(selection="error", single=0.125, tail=False, block_size=64, backend="torch")
    assert config.to_dict() == {
        "sparsity": 0.5,
        "selection": "error",
        "tail": False,
        "tokens": None,
        "tile": None,
        "block_size": 64,
        "dense_steps": 0.2,
        "dense_end": 0,
        "dense_layers": 1,
        "min_tokens": None,
        "backend": "torch",
        "precision": "full",
        "dense_above": None,
        "made_for": None,
    }


def test_a_budget_for_another_model_is_refused_by_enable():
    model = tiny_wan(layers=3)()
    config = DraftAttentionConfig(Budget(0.5, layers=(1.0, 1.0)))
    with pytest.raises(ValueError, match=r"budget weights layers must have shape \(3,\) for this model, got \(2,\)"):
        draftdiff.enable(model, config)
    assert "draft_layer" not in dir(model.blocks[0].attn1.processor)


@pytest.mark.parametrize(("limit", "dense"), [(0.31, False), (0.3, True), (None, False)])
def test_layers_at_least_as_dense_as_dense_above_are_dense(limit, dense):
    case = MODEL_CASES[0]
    model = case.build()
    fields = {"sparsity": 0.7, "dense_steps": 0, "dense_layers": 0, "min_tokens": 0}
    draftdiff.enable(model, {**fields, "dense_above": limit})
    output_of(model, case.inputs(model, case.grid, 1))
    assert (draftdiff.report(model).transformers[0].sparse_steps == 0) == dense
