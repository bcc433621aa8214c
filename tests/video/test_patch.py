"""enable, disable and report on a tiny random instance of every supported model."""

import copy
import gc
import weakref

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

import draftdiff
from draftdiff import DraftAttentionConfig
from draftdiff.video import hook
from draftdiff.video.layouts import layout_for
from tests.rounding import rounded
from tests.video.model_cases import MODEL_CASES, OF_EACH_KIND, output_of

ALWAYS = {"dense_steps": 0, "dense_layers": 0, "min_tokens": 0}
SPARSE = DraftAttentionConfig(sparsity=0.7, **ALWAYS)
models = pytest.mark.parametrize("case", MODEL_CASES, ids=str)
kinds = pytest.mark.parametrize("case", OF_EACH_KIND, ids=str)


@pytest.fixture
def model(case):
    return case.build()


@models
def test_a_full_budget_equals_dense_attention(case, model):
    inputs = case.inputs(model, case.grid, 2)
    dense = rounded(lambda: output_of(model, inputs))
    draftdiff.enable(model, DraftAttentionConfig(selection="full", **ALWAYS))
    dense.check(output_of(model, inputs))


@models
def test_sparse_output_is_the_reference_backends_and_not_dense(case, model):
    inputs = case.inputs(model, case.grid, 2)
    dense = output_of(model, inputs)
    draftdiff.enable(model, DraftAttentionConfig(sparsity=0.7, backend="reference", **ALWAYS))
    reference = rounded(lambda: output_of(model, inputs))
    draftdiff.enable(model, DraftAttentionConfig(sparsity=0.7, backend="torch", **ALWAYS))
    sparse = output_of(model, inputs)
    reference.check(sparse)
    assert float((sparse - dense).abs().max()) > 1e-3


@models
def test_disable_restores_the_model_exactly(case, model):
    inputs = case.inputs(model, case.grid, 2)
    attributes = {name: set(m.__dict__) for name, m in model.named_modules()}
    processors = {name: m.processor for name, m in model.named_modules() if hasattr(m, "processor")}
    dense = output_of(model, inputs)
    draftdiff.enable(model, SPARSE)
    output_of(model, inputs)
    draftdiff.disable(model)
    assert torch.equal(output_of(model, inputs), dense)
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == attributes
    assert all(m.processor is processors[name] for name, m in model.named_modules() if name in processors)


@kinds
def test_a_batch_equals_its_items_one_by_one(case, model, monkeypatch):
    def drawn(error, _density, rows):
        """Of tiles and tokens that are as good as equal, rounding would choose: here nothing depends on it."""
        tiles = torch.rand(error.shape[1:], generator=torch.Generator().manual_seed(0)) < 0.3
        own = torch.eye(tiles.shape[-1], dtype=torch.bool)
        return (tiles | (own if rows is None else own[rows])).expand_as(error)

    def first(_q_mean, _k, _v, _means, tiling, keep, *, tokens, **_more):
        """Those of each query tile that come first outside its kept tiles."""
        outside = (~keep[..., None] & (tiling.slots[: tiling.video_tiles] >= 0)).flatten(3).int()
        found = outside.sort(stable=True, dim=-1, descending=True)
        positions = tiling.slots[: tiling.video_tiles].flatten()[found.indices].masked_fill(found.values == 0, -1)
        return positions[..., :tokens].int().contiguous(), None

    monkeypatch.setattr("draftdiff.attention.attend.worst", drawn)
    monkeypatch.setattr("draftdiff.attention.attend.singles", first)
    draftdiff.enable(model, SPARSE)
    inputs = case.inputs(model, case.grid, 2)
    if not case.batched:
        pytest.skip("it takes one item, or a cache that is not cut")
    both = rounded(lambda: output_of(model, inputs).split(1), samples=8)
    both.check([output_of(model, {name: item_of(name, value, i) for name, value in inputs.items()}) for i in range(2)])


def item_of(name, value, i):
    """Batch item i of a forward argument; what is not per item stays."""
    if isinstance(value, torch.Tensor) and name == "encoder_hidden_states_llama3":  # layers come first
        return value[:, i : i + 1]
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == 2 and not name.startswith("indices"):
        return value[i : i + 1]
    if isinstance(value, dict):
        return {key: item_of(key, entry, i) for key, entry in value.items()}
    if isinstance(value, list):
        return value[i : i + 1] if len(value) == 2 else [item_of(name, entry, i) for entry in value]
    return value


@kinds
@pytest.mark.parametrize("grid", [(5, 13, 9), (3, 7, 11)], ids=str)
def test_odd_grids_read_no_padding(case, model, grid):
    if case.grid[0] == 1:  # images
        grid = (1, *grid[1:])
    inputs = case.inputs(model, case.fits(grid), 1)
    dense = rounded(lambda: output_of(model, inputs))
    draftdiff.enable(model, DraftAttentionConfig(selection="full", **ALWAYS))
    dense.check(output_of(model, inputs))
    draftdiff.enable(model, SPARSE)
    assert output_of(model, inputs).isfinite().all()


@kinds
def test_report_tells_what_was_done(case, model):
    draftdiff.enable(model, DraftAttentionConfig(sparsity=0.7, **{**ALWAYS, "dense_layers": 1}))
    inputs = case.inputs(model, case.grid, 2)
    output_of(model, inputs)
    told = draftdiff.report(model).transformers[0]
    assert (told.sparse_steps, told.dense_steps) == (1, 0)
    assert len(told.layers) == case.layers
    assert not told.reasons
    density = told.density[0]
    assert density[0] == 1
    assert bool((density[1:] < 0.8).all())
    assert bool((told.missed_mass[0, 1:] > 0).all())
    assert {"draft", "select", "kernel", "dense attention", "sparse forward"} <= set(told.seconds)
    assert case.build().__class__.__name__ in str(draftdiff.report(model))


@kinds
def test_few_tokens_are_left_alone(case, model):
    inputs = case.inputs(model, case.grid, 1)
    dense = output_of(model, inputs)
    draftdiff.enable(model, DraftAttentionConfig(dense_steps=0, dense_layers=0, min_tokens=10_000))
    assert torch.equal(output_of(model, inputs), dense)


@kinds
def test_nan_in_the_latents_is_reported(case, model):
    draftdiff.enable(model, SPARSE)
    inputs = case.inputs(model, case.grid, 1)
    latents = inputs[layout_for(model).inputs[0]]
    (latents if isinstance(latents, torch.Tensor) else latents[0]).view(-1)[3] = float("nan")
    with pytest.raises(ValueError, match="hold NaN or inf at step 0"):
        output_of(model, inputs)


def test_nan_inside_the_model_names_the_layer():
    case = MODEL_CASES[0]
    model = draftdiff.enable(case.build(), SPARSE)
    model.blocks[1].attn1.to_k.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"query or key of blocks\.1\.attn1 hold NaN at step 0"):
        output_of(model, case.inputs(model, case.grid, 1))


def test_enabling_twice_applies_the_new_config():
    case = MODEL_CASES[0]
    model = case.build()
    inputs = case.inputs(model, case.grid, 1)
    once = output_of(draftdiff.enable(copy.deepcopy(model), SPARSE), inputs)
    draftdiff.enable(model, DraftAttentionConfig(sparsity=0.2, **ALWAYS))
    draftdiff.enable(model, SPARSE)
    assert torch.equal(output_of(model, inputs), once)
    draftdiff.disable(model)
    assert "forward" not in model.__dict__


def test_disabling_twice_does_nothing():
    model = MODEL_CASES[0].build()
    draftdiff.disable(draftdiff.disable(draftdiff.enable(model)))
    assert not hasattr(model, "_diffusers_hook")


def backends():
    """What diffusers' dispatcher lists. Models of earlier tests may leave it at any time: compare what is added."""
    return set(AttentionBackendName)


def test_backends_of_two_models_do_not_mix():
    before = backends()
    case = MODEL_CASES[0]
    first, second = case.build(), case.build()
    inputs = case.inputs(first, case.grid, 1)
    dense = rounded(lambda: output_of(first, inputs))
    draftdiff.enable(first, SPARSE)
    draftdiff.enable(second, DraftAttentionConfig(selection="full", **ALWAYS))
    dense.check(output_of(second, inputs))
    sparse = output_of(first, inputs)
    assert float((sparse - dense.out).abs().max()) > 1e-3
    draftdiff.disable(second)
    assert torch.equal(output_of(first, inputs), sparse)
    draftdiff.disable(first)
    assert not backends() - before


def test_a_model_dropped_without_disable_is_freed_and_its_entry_cleared_by_the_next():
    gc.collect()
    case = MODEL_CASES[0]
    draftdiff.disable(draftdiff.enable(case.build(), SPARSE))
    before = backends()
    model = draftdiff.enable(case.build(), SPARSE)
    output_of(model, case.inputs(model, case.grid, 1))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    draftdiff.disable(draftdiff.enable(case.build(), SPARSE))
    assert not backends() - before


def test_a_model_outside_the_table_is_named_with_those_inside():
    with pytest.raises(ValueError, match=r"Linear is not supported; supported transformers: WanTransformer3DModel, "):
        draftdiff.enable(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected a diffusers pipeline or transformer, got int"):
        draftdiff.enable(3)


def test_a_report_needs_enable():
    with pytest.raises(ValueError, match="draftdiff is not enabled on this WanTransformer3DModel"):
        draftdiff.report(MODEL_CASES[0].build())


@pytest.mark.parametrize(("sparsity", "density"), [(0.2, 1.0), (0.8, 0.2)])
def test_layers_so_dense_that_dense_attention_is_faster_are_left_to_it(monkeypatch, sparsity, density):
    monkeypatch.setattr(hook, "dense_wins_above", lambda *call: 0.5)
    case = MODEL_CASES[0]
    model = case.build()
    inputs = case.inputs(model, (4, 16, 16), 1)
    dense = output_of(model, inputs)
    config = DraftAttentionConfig(sparsity=sparsity, dense_steps=0, dense_layers=0)
    out = output_of(draftdiff.enable(model, config), inputs)
    assert torch.equal(out, dense) == (density == 1.0)
    assert draftdiff.report(model).transformers[0].density.mean() == pytest.approx(density, abs=0.1)
