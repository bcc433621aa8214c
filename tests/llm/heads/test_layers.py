"""Decoder layers over hidden states: read in pieces, padded, and as trees they say what they say of the whole."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from draftdiff.llm.heads.layers import Stack
from tests.llm.tiny_heads import randomised

CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "attn_implementation": "sdpa",
}


@pytest.fixture(params=[{}, {"num_key_value_heads": 2}, {"attention_bias": True, "head_dim": 16}], ids=str)
def stack(request):
    config = LlamaConfig(**CONFIG | request.param)
    return config, randomised(Stack(config, reads_tokens=True))


def inputs(rows, tokens):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, tokens, 32, generator=generator) for _ in range(2)]


@torch.no_grad()
def test_pieces_on_a_cache_are_the_whole(stack):
    config, layers = stack
    x, embedded = inputs(2, 11)
    places = torch.arange(11)[None]
    whole = layers(x, embedded, None, places)
    cache = DynamicCache(config=config)
    parts = [
        layers(x[:, piece], embedded[:, piece], None, places[:, piece], cache)
        for piece in (slice(0, 5), slice(5, 6), slice(6, 11))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_in_front_changes_nothing_and_what_it_says_is_a_number(stack):
    _, layers = stack
    x, embedded = inputs(1, 9)
    alone = layers(x[:, 4:], embedded[:, 4:], None, torch.arange(5)[None])
    mask = (torch.arange(9) >= 4).long()[None]
    padded = layers(x, embedded, mask, (mask.cumsum(-1) - 1).clamp(min=0))
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[:, 4:], alone, atol=1e-5, rtol=1e-5)
