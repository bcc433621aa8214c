"""The probe: mean queries against every single key, for what a map of means cannot see.

A skipped tile is read through its mean, and what matters is how wrong that is, not how much mass the tile has: what the
mean does well needs no computing. `errors` says it of whole tiles (the measure of SVG-EAR, arXiv 2603.08982), of which
the worst are kept; `singles` finds, by the same measure, the worst single keys of those that are left.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from draftdiff.core.draft import Tail
from draftdiff.core.grid import Tiling

_SCORES = 1 << 24  # held at once
_HIGHEST = 40.0  # of a score above that of its tile's mean: its square is still a float


@torch.no_grad()
def errors(q_mean: Tensor, k: Tensor, v: Tensor, means: Tail, tiling: Tiling, *, scale: float) -> Tensor:
    """How wrong it is to read a key tile through its mean: the root of the sum of |e^score v - e^center v_mean|^2 over
    its tokens, for the mean query of each query tile; center is the score of the mean key.

    q_mean: fp32 [batch, heads, rows, head_dim], of all video tiles or some.  k, v: [batch, tokens, heads, head_dim].
    means: of k and v.
    Returns its logarithm, fp32 [batch, heads, rows, video_tiles], -inf for a tile that its mean is equal to.
    """
    error = q_mean.new_empty(*q_mean.shape[:3], tiling.video_tiles)
    for at, center, squares in _squared(q_mean, k, v, means, tiling, scale):
        error[at] = center + 0.5 * squares.sum(-1).log()
    return error


def worst(error: Tensor, density: Tensor, rows: Tensor | None = None) -> Tensor:
    """The tiles of the greatest error, its own always among them, equally many for each query tile but for one more in
    some, where a budget is no whole number.

    error: [batch, heads, rows, tiles].  density: share that is kept, float64 [heads].  rows: the query tile of each
    row, int64 [rows], if not all have one.  Returns bool like error.
    """
    tiles = error.shape[-1]
    place = torch.arange(tiles, device=error.device)
    rows = place if rows is None else rows
    most = counts(density, tiles).to(error.device)[:, rows]
    error = error.masked_fill(error.isnan(), float("-inf"))  # which would come first
    ranking = error.masked_fill(place == rows[:, None], float("inf")).argsort(-1, descending=True)
    kept = torch.zeros_like(error, dtype=torch.bool)
    return kept.scatter_(-1, ranking, (place < most[..., None]).expand_as(kept))


def counts(density: Tensor, tiles: int) -> Tensor:
    """How many tiles each row keeps, at least one, int64 [heads, tiles]; of all rows together so many as the share,
    float64 [heads], allows."""
    spent = density[:, None] * tiles * torch.arange(tiles + 1, dtype=density.dtype, device=density.device)
    return (spent + 1e-6).floor().diff().long().clamp(1, tiles)


@torch.no_grad()
def singles(
    q_mean: Tensor, k: Tensor, v: Tensor, means: Tail, tiling: Tiling, keep: Tensor, *, scale: float, tokens: int
) -> Tensor:
    """The single keys outside the kept tiles that their tile's mean stands for worst.

    keep: bool [batch, heads, rows, video_tiles].  tokens: how many.  The others as for `errors`.
    Returns int32 [batch, heads, rows, tokens], positions in k, -1 where no more are left.
    """
    slots = tiling.slots[: tiling.video_tiles]
    absent, found = slots < 0, torch.full((*q_mean.shape[:3], tokens), -1, dtype=torch.int32, device=k.device)
    few = min(tokens, slots.numel())
    for at, center, squares in _squared(q_mean, k, v, means, tiling, scale):
        hidden = keep[at][..., None] | absent
        error = (2 * center[..., None] + squares.log()).masked_fill(hidden, float("-inf"))
        error = error.masked_fill(error.isnan(), float("-inf")).flatten(1)
        value, best = error.topk(few, sorted=False)
        found[(*at, slice(few))] = slots.flatten()[best].int().masked_fill(value == float("-inf"), -1)
    return found


def _squared(
    q_mean: Tensor, k: Tensor, v: Tensor, means: Tail, tiling: Tiling, scale: float
) -> Iterator[tuple[tuple[int, int, Tensor], Tensor, Tensor]]:
    """Some query tiles of a head at a time: where they are, their scores with the mean keys [rows, tiles], and of each
    key the squared error under its tile's mean, over the square of that mean's weight [rows, tiles, block_size]."""
    slots = tiling.slots[: tiling.video_tiles]
    absent = (slots < 0)[..., None]
    for b in range(k.shape[0]):
        for h in range(k.shape[2]):
            keys, values = (x[b, :, h].float()[slots.clamp(min=0)].masked_fill(absent, 0) for x in (k, v))
            k_mean, v_mean = means.k_mean[b, h], means.v_mean[b, h]
            length, along = values.square().sum(-1), (values * v_mean[:, None]).sum(-1)
            rest = v_mean.square().sum(-1, keepdim=True) * ~absent[..., 0]
            for rows in torch.arange(q_mean.shape[2], device=k.device).split(max(1, _SCORES // slots.numel())):
                q = q_mean[b, h, rows] * scale
                center = q @ k_mean.T
                weight = (torch.einsum("qd,tsd->qts", q, keys) - center[..., None]).clamp(max=_HIGHEST).exp()
                squares = weight * (weight * length - 2 * along) + rest
                yield (b, h, rows), center, squares.clamp(min=0)
