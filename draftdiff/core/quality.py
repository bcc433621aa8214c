"""How good a selection is: what it keeps, and what it misses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from draftdiff.core.grid import Tiling
from draftdiff.core.select import BlockMask


def density(mask: BlockMask, tiling: Tiling) -> Tensor:
    """Share of query-key token pairs that are computed, fp32 [batch, heads], text included."""
    tokens = tiling.counts.to(torch.float32)
    return torch.einsum("bhqk,q,k->bh", mask.keep.to(torch.float32), tokens, tokens) / tokens.sum() ** 2


def drafted_mass(probabilities: Tensor, keep: Tensor) -> Tensor:
    """Mass that the draft map gives to the kept video tiles, fp32 [batch, heads], averaged over query tiles."""
    return (probabilities * keep).sum(-1).mean(-1)


def missed_mass(
    q: Tensor, k: Tensor, mask: BlockMask, tiling: Tiling, *, rows: Tensor, scale: float | None = None
) -> Tensor:
    """Exact share of softmax mass on skipped tiles, for the given query rows.

    q, k: [batch, tokens, heads, head_dim] in model order.  rows: int64 [n], positions in model order.
    Returns fp32 [batch, heads, n]. A query that misses mass e changes its output, without the tail, by at most
    2 * e * max|v|.
    """
    scale = scale or 1 / math.sqrt(q.shape[-1])
    scores = torch.einsum("bqhd,bkhd->bhqk", q[:, rows].float(), k.float()) * scale
    tile_of = torch.empty_like(tiling.order)
    tile_of[tiling.order] = torch.repeat_interleave(torch.arange(tiling.tiles, device=q.device), tiling.counts)
    skipped = ~mask.keep[:, :, tile_of[rows]][..., tile_of]
    return (scores.softmax(-1) * skipped).sum(-1)
