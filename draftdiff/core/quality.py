"""How good a selection is: what it computes, and what it covers."""

from __future__ import annotations

import torch
from torch import Tensor

from draftdiff.core.grid import Tiling


def density(
    keep: Tensor,
    tiling: Tiling,
    tokens: Tensor | None = None,
    taken: Tensor | None = None,
    queries: Tensor | None = None,
) -> Tensor:
    """Share of query-key token pairs that are computed, fp32 [batch, heads], text included.

    keep: bool [batch, heads, tiles, tiles].  tokens: single ones, [batch, heads, video_tiles, any], -1 for none.
    taken: how many of them are of each tile, [batch, heads, video_tiles, video_tiles], if that is known.
    queries: the query tiles that count, all if None."""
    counts = tiling.counts.to(torch.float32)
    asked = counts if queries is None else torch.zeros_like(counts).index_copy_(0, queries, counts[queries])
    pairs = torch.einsum("bhqk,q,k->bh", keep.to(torch.float32), asked, counts)
    if tokens is not None:
        read = tokens >= 0 if taken is None else taken
        pairs = pairs + read.sum(-1).to(torch.float32) @ asked[: tiling.video_tiles]
    return pairs / (asked.sum() * counts.sum())


def drafted_mass(probabilities: Tensor, keep: Tensor) -> Tensor:
    """Mass that the draft map gives to the kept video tiles, fp32 [batch, heads], averaged over query tiles."""
    return (probabilities * keep).sum(-1).mean(-1)
