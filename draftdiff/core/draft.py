"""The draft: queries, keys and values averaged over tiles, and the attention map between those averages.

Source: DraftAttention (arXiv 2505.14708), section 3.1. Beyond it: grids that boxes do not fill (means over the tokens
that are there), fp32 scores, and pooled values for the tail of skipped tiles (as in PISA, arXiv 2602.01077).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from draftdiff.core.grid import Part, Tiling
from draftdiff.core.values import is_number, shown
from draftdiff.errors import UserError


def pool(x: Tensor, tiling: Tiling) -> Tensor:
    """Mean of x [batch, tokens, heads, head_dim] over the tokens of each video tile.

    Returns fp32 [batch, heads, video_tiles, head_dim], accumulated in fp32.
    """
    sums, first = [], 0
    for part in tiling.parts:
        boxes, tiles = math.prod(part.boxes), part.tiles(tiling.block_size)
        sums += [_of_boxes(x, part), _of_slots(x, tiling.slots[first + boxes : first + tiles])]
        first += tiles
    return torch.cat(sums, dim=2) / tiling.counts[:first, None]


def _of_boxes(x: Tensor, part: Part) -> Tensor:
    """Sums over the boxes of one grid, fp32 [batch, heads, boxes, head_dim]."""
    frames, height, width = (boxes * size for boxes, size in zip(part.boxes, part.tile))
    sums = x[:, part.start : part.stop].unflatten(1, part.grid.shape)[:, :frames, :height, :width]
    for axis in (3, 2, 1):  # columns first: one pass over the tokens, the others over ever fewer sums
        sums = sums.unflatten(axis, (part.boxes[axis - 1], part.tile[axis - 1])).sum(axis + 1, dtype=torch.float32)
    return rearrange(sums, "b f h w n d -> b n (f h w) d")


def _of_slots(x: Tensor, slots: Tensor) -> Tensor:
    """Sums over tiles by their slots, fp32 [batch, heads, tiles, head_dim]."""
    absent = (slots < 0)[..., None, None]
    return rearrange(x[:, slots.clamp(min=0)].masked_fill(absent, 0).sum(2, dtype=torch.float32), "b t n d -> b n t d")


def softmax_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the scores: scale, which may be 0, or 1/sqrt(head_dim) if None. Raises ValueError for what is no
    finite number."""
    if scale is None:
        return 1 / math.sqrt(head_dim)
    if not is_number(scale):
        raise UserError(f"scale must be a finite number or None, got {shown(scale)}")
    return float(scale)


def draft_map(q_mean: Tensor, k_mean: Tensor, *, scale: float | None = None, counts: Tensor | None = None) -> Tensor:
    """Low-resolution attention map: row-wise softmax of pooled scores (arXiv 2505.14708, Eq. 3).

    q_mean, k_mean: fp32 [batch, heads, tiles, head_dim].  scale: 1/sqrt(head_dim) if None.
    counts [tiles]: if given, a tile weighs as many keys as it has, so that one of few is not overrated.
    Returns fp32 [batch, heads, tiles, tiles].
    """
    scores = q_mean @ k_mean.transpose(-1, -2) * softmax_scale(scale, q_mean.shape[-1])
    if counts is not None:
        scores += counts.log()
    return scores.softmax(dim=-1)


@dataclass(frozen=True)
class Tail:
    """What stands in for the tiles that a query tile skips: each as one key and one value, counted as often as it has
    tokens. k_mean, v_mean: fp32 [batch, heads, video_tiles, head_dim].
    """

    k_mean: Tensor
    v_mean: Tensor
