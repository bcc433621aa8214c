"""A cut cache counts as the whole prompt, grows, and rolls back."""

import copy

import pytest
import torch
from transformers import AutoConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from draftdiff.hosts.transformers import cache_argument
from draftdiff.llm.kept_cache import KeptCache, KeptLayer, end_sliding_layer
from tests.llm.rounding import assert_rounded
from tests.llm.tiny_models import prompt, tiny_model


def cut_layer():
    """Two key heads, of nine tokens the first eight count, and three of those are kept."""
    layer = KeptLayer()
    key, value = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    layer.update(key, value)
    indices = torch.tensor([[[0, 3, 7], [5, 6, 7]]])
    layer.keep(indices, 8)
    return layer, key, value, indices


def test_a_cut_layer_holds_what_it_keeps_and_counts_everything():
    layer, key, value, indices = cut_layer()
    for head in range(2):
        assert torch.equal(layer.keys[0, head], key[0, head, indices[0, head]])
        assert torch.equal(layer.values[0, head], value[0, head, indices[0, head]])
    assert (layer.physical_length, layer.dropped, layer.get_seq_length()) == (3, 5, 8)
    assert layer.get_mask_sizes(2) == (5, 5)
    assert layer.keys.untyped_storage().nbytes() == 3 * 2 * 4 * 4


def test_new_tokens_come_after_and_can_be_taken_back():
    layer, *_ = cut_layer()
    kept, new = layer.keys, torch.randn(1, 2, 4, 4)
    keys, _ = layer.update(new, new)
    assert torch.equal(keys, torch.cat([kept, new], dim=2))
    assert (layer.physical_length, layer.get_seq_length()) == (7, 12)
    layer.crop(-3)
    assert (layer.physical_length, layer.get_seq_length()) == (4, 9)
    assert torch.equal(layer.keys, torch.cat([kept, new[:, :, :1]], dim=2))
    layer.crop(0)
    with pytest.raises(ValueError, match="at most 1 tokens came after the eviction and can be removed, got -2"):
        layer.crop(-2)
    with pytest.raises(ValueError, match="crop takes a negative number of tokens to remove, got 4"):
        layer.crop(4)
    layer.crop(-1)
    assert torch.equal(layer.keys, kept)


def test_a_layer_that_dropped_nothing_rolls_back_as_far_as_one_likes():
    layer = KeptLayer()
    key = torch.randn(1, 2, 6, 4)
    layer.update(key, key)
    layer.keep(torch.arange(5).expand(1, 2, 5), 5)
    layer.crop(-3)
    assert layer.get_seq_length() == 2 and torch.equal(layer.keys, key[:, :, :2])


def test_a_reset_layer_is_as_new():
    layer, key, *_ = cut_layer()
    layer.reset()
    assert (layer.physical_length, layer.dropped, layer.get_seq_length(), layer.get_mask_sizes(3)) == (0, 0, 0, (3, 0))
    layer.crop(-1)
    layer.update(key, key)
    assert layer.get_seq_length() == 9


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@torch.no_grad()
def test_several_tokens_at_once_are_as_one_by_one_and_rejected_ones_leave_no_trace(family):
    """What speculation does: explicit positions, a mask over the physical length and new tokens, and a roll-back."""
    model = tiny_model(family, layers=2)
    name, ids = cache_argument(model), prompt(12)
    cache = KeptCache(model.config)
    model(ids, **{name: cache})
    for layer in cache.kept_layers.values():
        layer.keep(torch.tensor([0, 1, 4, 6, 7, 10, 11]).expand(1, 2, 7), 12)
    if family == "gemma3_text":
        end = cache.layers[0]
        assert isinstance(end, DynamicSlidingWindowLayer) and end.get_seq_length() == 12
    new = prompt(3, seed=1)
    single = copy.deepcopy(cache)
    expected = torch.cat([model(new[:, i : i + 1], **{name: single}).logits for i in range(3)], dim=1)

    at_once = model(new, **{name: copy.deepcopy(cache)}).logits  # the host's own mask and positions
    assert_rounded(at_once, expected, model, ids)

    def masks(tokens):
        """By layer type: all that is there, and causal among the new."""
        made = {}
        for layer in cache.layers:
            there = layer.keys.shape[-2]
            mask = torch.ones(1, 1, tokens, there + tokens, dtype=torch.bool).tril(there)
            made["sliding_attention" if layer.is_sliding else "full_attention"] = mask
        return made if len(made) > 1 else made["full_attention"]

    wrong = torch.tensor([[int(new[0, 0]), 5, 6]])
    where = torch.arange(12, 15)[None]
    model(wrong, attention_mask=masks(3), position_ids=where, **{name: cache})
    cache.crop(-2)
    assert cache.get_seq_length() == 13 and next(iter(cache.kept_layers.values())).physical_length == 8
    rest = model(new[:, 1:], attention_mask=masks(2), position_ids=where[:, 1:], **{name: cache}).logits
    assert_rounded(rest, expected[:, 1:], model, ids)


def test_a_sliding_layer_ends_as_the_host_would_have_left_it():
    key, value = torch.randn(2, 2, 30, 4), torch.randn(2, 2, 30, 4)
    for length in (3, 15, 16, 22):
        host, ours = (DynamicSlidingWindowLayer(sliding_window=16) for _ in range(2))
        host.update(key[:, :, :length], value[:, :, :length])
        ours.update(key, value)
        end_sliding_layer(ours, key, value, length)
        assert torch.equal(ours.keys, host.keys) and torch.equal(ours.values, host.values)
        assert ours.get_seq_length() == host.get_seq_length() and ours.get_mask_sizes(2) == host.get_mask_sizes(2)
        assert ours.keys.untyped_storage().nbytes() == ours.keys.numel() * 4  # and no more is held


def test_layers_of_full_attention_are_kept_layers_and_sliding_ones_the_hosts():
    assert list(KeptCache(tiny_model("gemma2", layers=4).config).kept_layers) == [1, 3]
    assert list(KeptCache(tiny_model("qwen3").config).kept_layers) == [0, 1, 2]


def test_models_that_cannot_be_evicted_from_are_errors():
    with pytest.raises(ValueError, match="a layer to evict from, all 3 of mistral have a window"):
        KeptCache(tiny_model("mistral sliding").config)
    config = AutoConfig.for_model("qwen3_next", num_hidden_layers=4)
    with pytest.raises(ValueError, match="full or sliding-window attention, layer 0 of qwen3_next keeps a Linear"):
        KeptCache(config)
