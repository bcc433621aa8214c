"""Pooling counts the tokens that are there, and the draft map is a softmax over tiles."""

import pytest
import torch

from draftdiff.core.draft import draft_map, pool
from draftdiff.core.grid import LatentGrid, tiling_for
from tests.rounding import rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pooled_mean_is_the_mean_of_the_tokens_of_its_tile(dtype):
    tiling = tiling_for(LatentGrid(5, 13, 9), (2, 4, 8), 64, text=11, lead=4)
    x = torch.randn(2, tiling.tokens, 3, 8).to(dtype)
    pooled = rounded(lambda: pool(x, tiling))
    assert pooled.out.dtype == torch.float32
    tiles = [tiling.slots[tile] for tile in range(tiling.video_tiles)]
    pooled.check(torch.stack([x[:, slots[slots >= 0]].double().mean(1).float() for slots in tiles], dim=2))


def test_a_tile_weighs_as_many_keys_as_it_has():
    # Keys alike everywhere: attention mass is the share of tokens.
    tiling = tiling_for(LatentGrid(1, 8, 12), (1, 8, 8), 64)
    zeros = torch.zeros(1, 1, 2, 4)
    probabilities = draft_map(zeros, zeros, counts=tiling.counts)
    torch.testing.assert_close(probabilities[0, 0, 0], torch.tensor([64.0, 32.0]) / 96)


def test_a_scale_of_zero_is_no_default():
    q_mean, k_mean = torch.randn(2, 1, 1, 4, 16)
    torch.testing.assert_close(draft_map(q_mean, k_mean, scale=0.0), torch.full((1, 1, 4, 4), 0.25))
    assert torch.equal(draft_map(q_mean, k_mean), draft_map(q_mean, k_mean, scale=0.25))


def test_on_tiles_of_equal_tokens_the_draft_map_is_the_true_attention():
    tiling = tiling_for(LatentGrid(2, 16, 16), (1, 8, 8), 64)
    centres = torch.randn(1, tiling.tiles, 2, 16)
    tokens = torch.empty(1, tiling.tokens, 2, 16)
    tokens[:, tiling.order] = centres.repeat_interleave(64, dim=1)
    q_mean = k_mean = pool(tokens, tiling)

    def mass():
        scores = torch.einsum("bqhd,bkhd->bhqk", tokens, tokens) / 4
        rows = scores.softmax(-1)[:, :, tiling.slots[:, 0]]
        return rows[..., tiling.order].unflatten(-1, (tiling.tiles, 64)).sum(-1)

    rounded(mass).check(draft_map(q_mean, k_mean, counts=tiling.counts))
