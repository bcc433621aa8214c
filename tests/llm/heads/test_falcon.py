"""The Falcon layer: who sees whom, the two readings of its LSTM, the original's files, and files of our own."""

import json

import pytest
import torch

from draftdiff.errors import UserError
from draftdiff.llm import FalconDrafter, HydraDrafter
from draftdiff.llm.heads.falcon import relaxed_mask
from draftdiff.llm.train.falcon import guess
from tests.llm.tiny_heads import falcon
from tests.llm.tiny_models import prompt, tiny_model


@pytest.fixture(scope="module")
def target():
    return tiny_model(layers=2)


def test_rows_see_their_block_what_is_before_it_and_all_of_the_past():
    pairs = [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
    ]
    assert relaxed_mask(6, 0, 2)[0].int().tolist() == pairs
    assert torch.equal(relaxed_mask(5, 0, 1)[0], torch.ones(5, 5, dtype=torch.bool).tril())
    late = relaxed_mask(3, 3, 2)[0].int().tolist()  # counted from the first new row
    assert late == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    padded = relaxed_mask(6, 0, 2, torch.tensor([[0, 1, 1, 1, 1, 1]]))[0]
    assert torch.equal(padded[1:, 1:], relaxed_mask(5, 0, 2)[0])
    assert padded[0].tolist() == [True] + [False] * 5 and not padded[1:, 0].any()


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("recurrent", [False, True])
@torch.no_grad()
def test_what_a_row_reads(k, recurrent, target):
    head = falcon(target, k=k, recurrent=recurrent).head
    ids, states = prompt(9), torch.randn(1, 9, 64)
    before, _ = guess(head, head, ids, states)
    states[0, 4] += 1
    changed = (guess(head, head, ids, states)[0] != before).any(-1)[0].nonzero().flatten().tolist()
    assert changed == list(range(4 // k * k, 9))  # from its block's first row on


def test_an_lstm_that_each_row_begins_anew_is_the_same_with_gradients_and_without(target):
    head, ids, states = falcon(target).head, prompt(8, batch=2), torch.randn(2, 8, 64)
    whole, _ = head.read(ids, states)
    with torch.no_grad():
        torch.testing.assert_close(head.read(ids, states)[0], whole)


@torch.no_grad()
def test_a_recurrent_lstm_goes_on_where_it_stood_and_the_other_does_not_look_back(target):
    ids, states = prompt(8, batch=2), torch.randn(2, 8, 64)
    for recurrent in (False, True):
        head = falcon(target, recurrent=recurrent).head
        whole, _ = head.read(ids, states)
        first, after = head.read(ids[:, :5], states[:, :5])
        rest, _ = head.read(ids[:, 5:], states[:, 5:], after)
        torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)
        alone, _ = head.read(ids[:, 5:], states[:, 5:])
        assert torch.allclose(alone, rest) != recurrent


@pytest.mark.parametrize("recurrent", [False, True])
def test_saved_layers_are_loaded_with_their_tree(recurrent, target, tmp_path):
    drafter = falcon(target, k=3, recurrent=recurrent)
    drafter.save_pretrained(tmp_path / "head")
    again = FalconDrafter.from_pretrained(tmp_path / "head", target)
    assert again.head.settings == drafter.head.settings and again.tree.paths == drafter.tree.paths
    for name, weight in drafter.head.state_dict().items():
        assert torch.equal(weight, again.head.state_dict()[name])
    with pytest.raises(UserError, match="holds heads of 'falcon', not of 'hydra'"):
        HydraDrafter.from_pretrained(tmp_path / "head", target)


def test_the_originals_files_are_loaded_and_damage_is_named(target, tmp_path):
    drafter = falcon(target)
    weights = drafter.head.state_dict() | {"embed_tokens.weight": torch.zeros(96, 64)}
    config = drafter.head.settings.layer | {"k_mask": 2}
    embedding = target.get_input_embeddings().weight.clone()
    cases = (
        ({}, {}, None),
        ({"k_mask": None}, {}, "lacks k_mask"),
        ({"k_mask": 0}, {}, "k must be a whole number from 1 on, got 0"),
        ({}, {"lstm.bias_hh_l1": None}, "lacks weight lstm.bias_hh_l1"),
        ({}, {"layers.0.input_layernorm.weight": torch.ones(64)}, "unknown weight layers.0.input_layernorm.weight"),
        ({"hidden_size": 32}, {}, "hidden size of 32, LlamaForCausalLM has 64"),
    )
    for number, (fields, changed, message) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        stored = {name: value for name, value in (config | fields).items() if value is not None}
        (folder / "config.json").write_text(json.dumps(stored))
        torch.save({n: x for n, x in (weights | changed).items() if x is not None}, folder / "pytorch_model.bin")
        if message is None:
            head = FalconDrafter.from_pretrained(folder, target).head
            assert all(torch.equal(x, weights[name]) for name, x in head.state_dict().items())
            assert FalconDrafter.from_pretrained(folder, target, recurrent=True).head.settings.recurrent
            continue
        with pytest.raises(UserError, match=message) as caught:
            FalconDrafter.from_pretrained(folder, target)
        assert "\n" not in str(caught.value)
    assert torch.equal(target.get_input_embeddings().weight, embedding)
