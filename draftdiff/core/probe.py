"""The probe: mean queries against every single key, for what a map of means cannot see.

Two choices come from it. `uneven`: the tiles whose mean would be the worst stand-in for their tokens (the measure of
SVG-EAR, arXiv 2603.08982); what the tail does well needs no computing, however much mass it has. `best_tokens`: the
best single keys outside the kept tiles, which a query tile reads one by one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from draftdiff.core.draft import Tail
from draftdiff.core.grid import Tiling

_SCORES = 1 << 24  # held at once
_HIGHEST = 40.0  # of a score above that of its tile's mean: its square is still a float


@torch.no_grad()
def choose(
    q_mean: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tail,
    tiling: Tiling,
    density: Tensor,
    *,
    scale: float,
    tokens: int,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The tiles that each query tile reads, and the single tokens besides.

    q_mean: fp32 [batch, heads, video_tiles, head_dim].  k, v: [batch, tokens, heads, head_dim].  means: of k and v.
    density: share of the video's keys that is read, float64 [heads].  tokens: how many of those are single.
    keep: bool [batch, heads, video_tiles, video_tiles], the tiles if they are chosen already; None for `uneven` ones,
    equally many for all rows of a head, its own tile always among them.
    Returns keep, and int64 [batch, heads, video_tiles, tokens]: positions in k, -1 where no more are left.
    """
    batch, heads, tiles, _ = q_mean.shape
    slots = tiling.slots[:tiles]
    absent = slots < 0
    most = ((density - tokens / tiling.grid.tokens) * tiles).long().clamp(1, tiles).to(k.device)
    kept = torch.empty(batch, heads, tiles, tiles, dtype=torch.bool, device=k.device) if keep is None else keep
    single = torch.empty(batch, heads, tiles, tokens, dtype=torch.long, device=k.device)
    for b in range(batch):
        for h in range(heads):
            keys = k[b, :, h].float()[slots.clamp(min=0)]
            if keep is None:
                values = v[b, :, h].float()[slots.clamp(min=0)].masked_fill(absent[..., None], 0)
            for rows in torch.arange(tiles, device=k.device).split(max(1, _SCORES // slots.numel())):
                q = q_mean[b, h, rows]
                scores = (q @ keys.flatten(0, 1).T * scale).unflatten(-1, slots.shape)
                if keep is None:
                    center = q @ means.k_mean[b, h].T * scale
                    error = log_error(scores, center, values, means.v_mean[b, h], absent)
                    kept[b, h, rows] = uneven(error, rows, most[h])
                if tokens:
                    single[b, h, rows] = best_tokens(scores, kept[b, h, rows], absent, slots, tokens)
    return kept, single


def log_error(scores: Tensor, center: Tensor, values: Tensor, v_mean: Tensor, absent: Tensor) -> Tensor:
    """Logarithm of how far off a query tile is where a key tile's mean stands for its tokens: the root of the sum of
    |e^score v - e^center v_mean|^2 over them.

    scores: [rows, tiles, block_size].  center: scores with the mean keys [rows, tiles].  values: [tiles, block_size,
    head_dim], 0 where absent.  v_mean: [tiles, head_dim].  absent: bool [tiles, block_size].  Returns [rows, tiles].
    """
    length, along = values.square().sum(-1), (values * v_mean[:, None]).sum(-1)
    weight = (scores - center[..., None]).clamp(max=_HIGHEST).exp()
    counts = (~absent).sum(-1)
    squares = (weight * (weight * length - 2 * along)).sum(-1) + counts * v_mean.square().sum(-1)
    return center + 0.5 * squares.clamp(min=0).log()


def uneven(error: Tensor, rows: Tensor, most: Tensor) -> Tensor:
    """The tiles of the greatest error, and each row's own, bool [rows, tiles].

    error: [rows, tiles].  rows: which query tiles they are, int64 [rows].  most: how many are kept, int64 [].
    """
    place = torch.arange(error.shape[-1], device=error.device)
    error = error.masked_fill(error.isnan(), float("-inf"))  # which would come first
    ranking = error.masked_fill(place == rows[:, None], float("inf")).argsort(-1, descending=True)
    kept = torch.zeros_like(error, dtype=torch.bool)
    return kept.scatter_(-1, ranking, (place < most).expand_as(kept))


def best_tokens(scores: Tensor, kept: Tensor, absent: Tensor, slots: Tensor, tokens: int) -> Tensor:
    """Positions of the keys with the highest scores outside the kept tiles, int64 [rows, tokens], -1 where there are no
    more.

    scores: [rows, tiles, block_size].  kept: bool [rows, tiles].  absent: bool [tiles, block_size].  slots: likewise,
    the position of each.
    """
    hidden = kept[..., None] | absent
    outside = scores.masked_fill(hidden, float("-inf")).flatten(1)
    found = outside.topk(min(tokens, outside.shape[-1]), sorted=False).indices
    positions = slots.flatten()[found].masked_fill(hidden.flatten(1).gather(-1, found), -1)
    return F.pad(positions, (0, tokens - positions.shape[-1]), value=-1)
