"""The probe's choices against their definitions, written out token by token."""

import math

import pytest
import torch

from draftdiff.core.draft import Tail, pool
from draftdiff.core.grid import LatentGrid, tiling_for
from draftdiff.core.probe import choose

GRIDS = [((2, 8, 16), (1, 8, 8), 0, 0), ((3, 9, 11), (2, 4, 8), 70, 33)]


def inputs(grid, tile, text, lead, heads=2):
    generator = torch.Generator().manual_seed(0)
    tiling = tiling_for(LatentGrid(*grid), tile, 64, text, lead)
    q, k, v = torch.randn(3, 1, tiling.tokens, heads, 16, generator=generator, dtype=torch.float32)
    return q * 2, k, v, tiling


def members(tiling):
    return [slots[slots >= 0] for slots in tiling.slots[: tiling.video_tiles]]


@pytest.mark.parametrize(("grid", "tile", "text", "lead"), GRIDS)
def test_the_kept_tiles_are_those_that_their_mean_stands_for_worst(grid, tile, text, lead):
    q, k, v, tiling = inputs(grid, tile, text, lead)
    density = torch.tensor([0.3, 0.7], dtype=torch.float64)
    means = Tail(pool(k, tiling), pool(v, tiling))
    keep, tokens = choose(pool(q, tiling), k, v, means, tiling, density, scale=0.25, tokens=0)
    assert tokens.shape[-1] == 0
    for h in range(2):
        most = max(1, int(density[h] * tiling.video_tiles))
        for row, mine in enumerate(members(tiling)):
            mean = q[0, mine, h].double().mean(0)
            errors = {}
            for tile_number, theirs in enumerate(members(tiling)):
                keys, values = k[0, theirs, h].double(), v[0, theirs, h].double()
                exact = (0.25 * keys @ mean).exp()[:, None] * values
                stood_for = math.exp(0.25 * keys.mean(0) @ mean) * values.mean(0)
                errors[tile_number] = float((exact - stood_for).square().sum().sqrt())
            errors[row] = math.inf
            best = sorted(errors, key=errors.get, reverse=True)[:most]
            assert set(keep[0, h, row].nonzero()[:, 0].tolist()) == set(best)


@pytest.mark.parametrize(("grid", "tile", "text", "lead"), GRIDS)
@pytest.mark.parametrize("given", [False, True])
def test_single_tokens_are_the_best_outside_the_kept_tiles(given, grid, tile, text, lead):
    q, k, v, tiling = inputs(grid, tile, text, lead)
    density = torch.full((2,), 0.5, dtype=torch.float64)
    tiles = tiling.video_tiles
    chosen = torch.rand(1, 2, tiles, tiles, generator=torch.Generator().manual_seed(1)) < 0.5 if given else None
    means = Tail(pool(k, tiling), pool(v, tiling))
    keep, tokens = choose(pool(q, tiling), k, v, means, tiling, density, scale=0.25, tokens=10, keep=chosen)
    assert chosen is None or torch.equal(keep, chosen)
    for h in range(2):
        for row, mine in enumerate(members(tiling)):
            mean = q[0, mine, h].double().mean(0)
            outside = [t for other, theirs in enumerate(members(tiling)) if not keep[0, h, row, other] for t in theirs]
            best = sorted((int(t) for t in outside), key=lambda t: float(k[0, t, h].double() @ mean), reverse=True)[:10]
            found = [t for t in tokens[0, h, row].tolist() if t >= 0]
            assert set(found) == set(best) and len(found) == len(best)


def test_where_fewer_keys_are_left_than_asked_for_all_are_read_once():
    q, k, v, tiling = inputs(*GRIDS[1])
    tiles = tiling.video_tiles
    keep = torch.ones(1, 2, tiles, tiles, dtype=torch.bool)
    keep[..., 0, 1] = False
    means, density = Tail(pool(k, tiling), pool(v, tiling)), torch.ones(2, dtype=torch.float64)
    for count in (100, 10_000):
        _, tokens = choose(pool(q, tiling), k, v, means, tiling, density, scale=1.0, tokens=count, keep=keep)
        assert tokens.shape[-1] == count
        left = tokens[0, 0, 0]
        assert set(left[left >= 0].tolist()) == set(members(tiling)[1].tolist())
        assert (tokens[0, :, 1:] == -1).all()


def test_scores_that_are_far_apart_do_not_overflow():
    q, k, v, tiling = inputs(*GRIDS[0])
    means = Tail(pool(1e3 * k, tiling), pool(v, tiling))
    keep, tokens = choose(
        pool(1e3 * q, tiling),
        1e3 * k,
        v,
        means,
        tiling,
        torch.full((2,), 0.5, dtype=torch.float64),
        scale=1.0,
        tokens=8,
    )
    assert (keep.sum(-1) == keep.sum(-1)[0, 0, 0]).all() and (tokens >= 0).all()
