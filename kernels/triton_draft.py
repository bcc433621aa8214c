"""The draft on a GPU in few launches: pooling in one per tensor, selection by the `draft` rule in three.

Twins of `core.draft.pool` and `core.select.select_draft`, with the same results.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftdiff.core.grid import Tiling
from draftdiff.kernels.triton_lists import on_device_of, tables_for

MOST_TILES = 8192  # a row is ranked in registers
_ROUNDS = 8  # of two bisections each, as many as core.select makes
_SCAN = 8192


@triton.jit
def _pool(
    x_ptr,
    out_ptr,
    slots_ptr,
    heads,
    video_tiles,
    x_batch,
    x_token,
    x_head,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    tile = tl.program_id(0)
    bh = tl.program_id(1)
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    position = tl.load(slots_ptr + tile * BLOCK + tl.arange(0, BLOCK))
    there = position >= 0
    dim = tl.arange(0, D_PAD)
    offsets = position.to(tl.int64)[:, None] * x_token + dim[None, :]
    x = tl.load(x_ptr + b * x_batch + h * x_head + offsets, mask=there[:, None] & (dim < D)[None, :], other=0.0).to(
        tl.float32
    )
    mean = tl.sum(x, 0) / tl.sum(there.to(tl.float32), 0)
    tl.store(out_ptr + (bh.to(tl.int64) * video_tiles + tile) * D + dim, mean, mask=dim < D)


def pool(x: Tensor, tiling: Tiling) -> Tensor:
    """As `core.draft.pool`: mean of x [batch, tokens, heads, head_dim] over each video tile, fp32
    [batch, heads, video_tiles, head_dim]."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, _, heads, head_dim = x.shape
    out = torch.empty((batch, heads, tiling.video_tiles, head_dim), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        _pool[(tiling.video_tiles, batch * heads)](
            x,
            out,
            tables_for(tiling).slots,
            heads,
            tiling.video_tiles,
            *x.stride()[:3],
            BLOCK=tiling.block_size,
            D=head_dim,
            D_PAD=triton.next_power_of_2(head_dim),
            num_warps=4,
        )
    return out


@triton.jit
def _cover(p_ptr, covered_ptr, floor_ptr, tiles, heads, SIZE: tl.constexpr):
    """Per entry of a row of the map, the mass of the entries before it in the row's ranking; -1 within the floor."""
    row = tl.program_id(0).to(tl.int64)
    own = row % tiles
    head = row // tiles % heads
    lane = tl.arange(0, SIZE)
    exists = lane < tiles
    p = tl.load(p_ptr + row * tiles + lane, mask=exists, other=0.0)
    # Non-negative floats sort as their bits do. A query tile's own tile comes first, lanes beyond the row last.
    p = tl.where(p == p, p, 0.0)  # a NaN may have a sign
    bits = tl.where(lane == own, 2.0, p).to(tl.int32, bitcast=True).to(tl.int64)
    ranked = tl.sort(tl.where(exists, bits << 32 | lane, -1), descending=True)
    entry = (ranked & 0xFFFFFFFF).to(tl.int32)
    real = ranked >= 0
    mass = tl.load(p_ptr + row * tiles + entry, mask=real, other=0.0)
    covered = tl.cumsum(mass, 0) - mass
    covered = tl.where(lane < tl.load(floor_ptr + head), -1.0, covered)
    tl.store(covered_ptr + row * tiles + entry, covered, mask=real)


@triton.jit
def _threshold(covered_ptr, budget_ptr, threshold_ptr, entries, heads, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """Bisect for the largest covered mass under which a head keeps at most its budget: two halvings per pass."""
    bh = tl.program_id(0)
    covered_ptr += bh.to(tl.int64) * entries
    budget = tl.load(budget_ptr + bh % heads)
    low = tl.full((), 0.0, tl.float32)
    high = tl.full((), 1.001, tl.float32)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        quarter = (low + middle) / 2
        three_quarters = (middle + high) / 2
        below_quarter = tl.zeros([BLOCK], tl.int32)
        below_middle = tl.zeros([BLOCK], tl.int32)
        below_three = tl.zeros([BLOCK], tl.int32)
        for start in range(0, entries, BLOCK):
            entry = start + tl.arange(0, BLOCK)
            covered = tl.load(covered_ptr + entry, mask=entry < entries, other=float("inf"))
            below_quarter += (covered < quarter).to(tl.int32)
            below_middle += (covered < middle).to(tl.int32)
            below_three += (covered < three_quarters).to(tl.int32)
        up = tl.sum(below_three, 0) <= budget
        fits = tl.sum(below_middle, 0) <= budget
        down = tl.sum(below_quarter, 0) <= budget
        high = tl.where(fits, tl.where(up, high, three_quarters), tl.where(down, middle, quarter))
        low = tl.where(fits, tl.where(up, three_quarters, middle), tl.where(down, quarter, low))
    tl.store(threshold_ptr + bh, low)


def select_draft(probabilities: Tensor, density: Tensor, *, row_floor: float = 0.5) -> Tensor:
    """As `core.select.select_draft`: probabilities [batch, heads, tiles, tiles], density float64 [heads]."""
    batch, heads, tiles, _ = probabilities.shape
    probabilities, device = probabilities.contiguous(), probabilities.device
    budget = (density.to(device) * tiles**2).clamp(min=tiles)
    floor = (row_floor * budget / tiles).floor().clamp(min=1).to(torch.int32)
    covered = torch.empty_like(probabilities)
    size = triton.next_power_of_2(tiles)
    threshold = torch.empty((batch, heads, 1, 1), dtype=torch.float32, device=device)
    with on_device_of(probabilities):
        _cover[(batch * heads * tiles,)](
            probabilities, covered, floor, tiles, heads, SIZE=size, num_warps=4 if size <= 1024 else 8
        )
        # A count is at most the budget if it is at most the whole part of it.
        _threshold[(batch * heads,)](
            covered,
            budget.to(torch.int32),
            threshold,
            tiles * tiles,
            heads,
            ROUNDS=_ROUNDS,
            BLOCK=min(_SCAN, triton.next_power_of_2(tiles * tiles)),
            num_warps=16,
        )
    everything = (budget >= tiles**2)[:, None, None]
    return (covered < threshold) | everything
