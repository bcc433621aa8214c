"""Frames of a reference that one frame each reads: against dense attention with the mask that says so."""

import pytest
import torch

from draftdiff.attention.attend import attend, attend_op, packed_places
from draftdiff.attention.rule import Rule
from draftdiff.core.grid import LatentGrid
from tests.attention.test_attend import BACKENDS, close, dense, half, made

GRID, OWN = LatentGrid(4, 9, 11), 3


def call(heads=2):
    """q, k, v, and the mask [queries, keys]: the last frames of the grid each see a frame behind it."""
    q, k, v = made(GRID.tokens + OWN * 99, heads=heads)
    frame = torch.arange(GRID.tokens) // 99
    own = frame[:, None] == torch.arange(OWN * 99) // 99 + GRID.frames - OWN
    return q[:, : GRID.tokens], k, v, torch.cat([torch.ones(GRID.tokens, GRID.tokens, dtype=torch.bool), own], dim=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_kept_is_dense_attention_with_the_mask(backend):
    q, k, v, mask = call(heads=4)
    k, v = k[:, :, :2], v[:, :, :2]
    out, (density, _) = attend(q, k, v, half(4), Rule("full", backend=backend), grid=GRID, own_frames=OWN)
    close(out, dense(q, *(x.repeat_interleave(2, dim=2) for x in (k, v)), mask))
    assert float(density) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_reference_is_exact_and_counted(backend):
    q, k, v, mask = call()
    rule = Rule("error", single=0.06, backend=backend)
    quiet = k.clone()
    quiet[:, : GRID.tokens] = 0  # every mean stands for its tile as the tile would
    quiet_v = v.clone()
    quiet_v[:, : GRID.tokens] = 1
    out, (density, _) = attend(q, quiet, quiet_v, half(), rule, grid=GRID, own_frames=OWN)
    close(out, dense(q, quiet, quiet_v, mask))
    alone = attend(q, quiet[:, : GRID.tokens], quiet_v[:, : GRID.tokens], half(), rule, grid=GRID)[1][0]
    pairs, own = GRID.tokens**2, OWN * 99**2
    assert float(density) == pytest.approx((float(alone) * pairs + own) / (pairs + own))


def test_gradients_are_those_of_dense_attention_with_the_mask():
    *parts, mask = call()
    parts = [x.clone().requires_grad_() for x in parts]
    given = (half(), None, packed_places(GRID.shape, own_frames=OWN), None, Rule("full").packed)
    out, _ = attend_op(*parts, *given)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(out, parts, weights)
    wide = [x.detach().double().requires_grad_() for x in parts]
    expected = torch.autograd.grad(dense(*wide, mask), wide, weights.double())
    for gradient, wanted in zip(found, expected):
        close(gradient, wanted, times=64)
