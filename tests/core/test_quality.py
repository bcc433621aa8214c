"""The figures that say what a selection is worth."""

import torch

from draftdiff.core import quality
from draftdiff.core.draft import draft_map, pool
from draftdiff.core.grid import LatentGrid, tiling_for
from draftdiff.core.select import BlockMask, select_draft, with_text
from draftdiff.kernels.block_sparse import block_sparse_attention


def test_density_counts_token_pairs_not_tiles():
    tiling = tiling_for(LatentGrid(1, 8, 10), (1, 8, 8), 64)  # tiles of 64 and 16 tokens
    keep = torch.tensor([[[[True, False], [False, True]]]])
    torch.testing.assert_close(quality.density(BlockMask(keep), tiling), torch.tensor([[(64**2 + 16**2) / 80**2]]))


def test_missed_mass_bounds_the_error_of_dropping():
    torch.manual_seed(3)
    tiling = tiling_for(LatentGrid(3, 9, 16), (1, 8, 8), 64, text=5)
    q, k, v = (torch.randn(2, tiling.tokens, 2, 32) for _ in range(3))
    probabilities = draft_map(pool(q, tiling), pool(k, tiling), counts=tiling.counts[: tiling.video_tiles])
    mask = with_text(select_draft(probabilities, torch.full((2,), 0.3, dtype=torch.float64)), tiling)
    rows = torch.arange(0, tiling.tokens, 7)
    missed = quality.missed_mass(q, k, mask, tiling, rows=rows)
    full = BlockMask(torch.ones_like(mask.keep))
    sparse, dense = (block_sparse_attention(q, k, v, m, tiling=tiling, backend="reference") for m in (mask, full))
    error = (sparse - dense)[:, rows].norm(dim=-1).transpose(1, 2)
    bound = 2 * missed * v.norm(dim=-1).amax(1)[..., None]
    assert bool((error <= bound + 1e-5).all())
    assert 0.05 < float(missed.mean()) < 0.95


def test_a_full_mask_misses_nothing():
    tiling = tiling_for(LatentGrid(1, 8, 16), (1, 8, 8), 64)
    q = torch.randn(1, 128, 1, 8)
    mask = BlockMask(torch.ones(1, 1, 2, 2, dtype=torch.bool))
    assert float(quality.missed_mass(q, q, mask, tiling, rows=torch.arange(128)).max()) == 0
