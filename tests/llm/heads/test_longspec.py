"""The LongSpec layer: what a token sees, attention in two parts, the original's files, and files of our own."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import DynamicCache

from draftdiff.errors import UserError
from draftdiff.hosts.transformers import cache_argument
from draftdiff.llm import HydraDrafter, LongSpecDrafter
from draftdiff.llm.heads.hybrid import attend, hybrid
from tests.llm.tiny_heads import longspec
from tests.llm.tiny_models import prompt, tiny_model


@pytest.fixture(scope="module")
def target():
    return tiny_model(layers=2)


@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 4, 8), (6, 2, 20), (3, 1, 128)])
def test_attention_in_two_parts_is_that_over_all_keys(heads, key_heads, width):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, 7, width, generator=generator)
    k, v = (torch.randn(2, key_heads, 40, width, generator=generator) for _ in range(2))
    mask = torch.rand(2, 7, 40, generator=generator) > 0.4
    mask[:, :, 30:37] |= torch.eye(7, dtype=torch.bool)  # each query sees its own key
    mask[1, 2, :30] = False  # and one nothing of the first part
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)
    parts = [(k[:, :, part], v[:, :, part], mask[:, :, part]) for part in (slice(0, 30), slice(30, 40))]
    torch.testing.assert_close(hybrid(q, *parts), whole, atol=1e-5, rtol=1e-5)
    out, lse = attend(q, *parts[0])
    assert not out[1, :, 2].any() and lse[1, :, 2].isneginf().all()


def keys_of(target, ids):
    cache = DynamicCache()
    target(ids, **{cache_argument(target): cache})
    return cache.layers[-1].keys, cache.layers[-1].values


@pytest.mark.parametrize("lag", [0, 1, 3])
@torch.no_grad()
def test_a_token_sees_the_window_before_it_and_keys_no_later_than_the_lag(target, lag):
    head, ids, places = longspec(target, window=5).head, prompt(16), torch.arange(16)[None]
    keys, values = keys_of(target, ids)
    before = head(ids, places, keys, values, lag)
    other = ids.clone()
    other[0, 6] += 1
    changed = (head(other, places, keys, values, lag) != before).any(-1)[0].nonzero().flatten().tolist()
    assert changed == list(range(6, 12))  # its own and the five after it
    values = values.clone()
    values[:, :, 6] += 1
    changed = (head(ids, places, keys, values, lag) != before).any(-1)[0].nonzero().flatten().tolist()
    assert changed == list(range(6 + lag, 16))


def test_saved_layers_are_loaded_and_not_as_others(target, tmp_path):
    drafter = longspec(target, window=9)
    drafter.save_pretrained(tmp_path / "head")
    again = LongSpecDrafter.from_pretrained(tmp_path / "head", target)
    assert again.head.settings == drafter.head.settings
    for name, weight in drafter.head.state_dict().items():
        assert torch.equal(weight, again.head.state_dict()[name])
    with pytest.raises(UserError, match="holds heads of 'longspec', not of 'hydra'"):
        HydraDrafter.from_pretrained(tmp_path / "head", target)


def test_the_originals_files_are_loaded_and_damage_is_named(target, tmp_path):
    drafter = longspec(target, window=512)
    weights = drafter.head.state_dict()
    config = {name: value for name, value in drafter.head.settings.layer.items() if name != "attention_bias"}
    unused = {f"cross_attn.{name}_proj.weight": torch.zeros(32, 64) for name in "kv"}
    cases = (
        ({}, {}, None),
        ({}, {"mlp.up_proj.weight": None}, "lacks weight mlp.up_proj.weight"),
        ({"hidden_size": 32}, {}, "hidden size of 32, LlamaForCausalLM has 64"),
        ({"vocab_size": None}, {}, "lacks vocab_size"),
        ({}, {"fc.weight": torch.zeros(2)}, "unknown weight fc.weight"),
    )
    for number, (fields, changed, message) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        stored = {name: value for name, value in (config | fields).items() if value is not None}
        (folder / "config.json").write_text(json.dumps(stored))
        there = {name: x for name, x in (weights | unused | changed).items() if x is not None}
        save_file(there, folder / "model.safetensors")
        if message is None:
            head = LongSpecDrafter.from_pretrained(folder, target).head
            assert head.settings.window == 512
            assert all(torch.equal(x, head.state_dict()[name]) for name, x in weights.items())
            continue
        with pytest.raises(UserError, match=message) as caught:
            LongSpecDrafter.from_pretrained(folder, target)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="window must be a whole number from 1 on, got 0"):
        LongSpecDrafter.from_target(target, window=0)
