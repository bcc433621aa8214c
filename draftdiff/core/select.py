"""From draft map and budget to the tiles that are computed.

`draft`: every query tile gets a floor of its best key tiles; what is left of the head's budget extends the rows whose
mass is least covered.  `upstream`: one threshold over the whole map of a head, as DraftAttention's authors
(arXiv 2505.14708, section 3.2) code it.  `full`: everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftdiff.core.grid import Tiling

SELECTIONS = ("draft", "upstream", "full")
_BISECTIONS = 16  # resolves a covered mass to 2**-16, far below what one tile carries


@dataclass(frozen=True)
class BlockMask:
    """Which key tiles each query tile reads: keep, bool [batch, heads, tiles, tiles], text tiles last."""

    keep: Tensor

    def lists(self) -> tuple[Tensor, Tensor]:
        """Per query tile the kept key tiles in ascending order.

        Returns counts int32 [batch, heads, tiles] and indices int32 [batch, heads, tiles, tiles]; entries past the
        count are the skipped tiles, also ascending.
        """
        counts = self.keep.sum(-1, dtype=torch.int32)
        indices = torch.argsort(self.keep.to(torch.uint8), dim=-1, descending=True, stable=True).to(torch.int32)
        return counts, indices


def with_text(keep: Tensor, tiling: Tiling) -> BlockMask:
    """A block mask over all tiles from the video tiles' keep [batch, heads, video_tiles, video_tiles]: text tiles read
    everything and are read by all."""
    video = tiling.video_tiles
    if tiling.tiles == video:
        return BlockMask(keep)
    full = keep.new_ones(*keep.shape[:2], tiling.tiles, tiling.tiles)
    full[:, :, :video, :video] = keep
    return BlockMask(full)


def select_draft(probabilities: Tensor, density: Tensor, *, row_floor: float = 0.5) -> Tensor:
    """Keep the best tiles of each row, under a budget per head.

    probabilities: draft map [batch, heads, tiles, tiles].  density: kept share, float64 [heads].
    row_floor: share of the budget that is dealt evenly to the rows (1: plain top-k, 0: plain top-p); each row keeps
    its own tile in any case. The rest goes to rows until all have covered the same mass.
    Returns bool [batch, heads, tiles, tiles], without an empty row: at most max(density * tiles, 1) per row on average,
    less where the tiles left carry no mass.
    """
    tiles = probabilities.shape[-1]
    budget = (density.to(probabilities.device) * tiles**2).clamp(min=tiles)[:, None, None]
    floor = (row_floor * budget / tiles).floor().clamp(min=1)

    own = torch.eye(tiles, dtype=torch.bool, device=probabilities.device)
    ranking = probabilities.masked_fill(own, 2.0).argsort(dim=-1, descending=True)
    ranked = probabilities.gather(-1, ranking)
    covered = ranked.cumsum(-1) - ranked
    # The floor comes before any mass.
    covered = covered.masked_fill(torch.arange(tiles, device=ranked.device) < floor, -1.0)

    low = torch.zeros(*ranked.shape[:2], 1, 1, device=ranked.device)
    high = torch.full_like(low, 1.0 + 1e-3)  # cumsum may end a rounding above 1
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        fits = (covered < middle).sum((-1, -2), keepdim=True) <= budget
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    everything = budget >= tiles**2
    kept = (covered < low) | everything
    return torch.zeros_like(kept).scatter_(-1, ranking, kept)


def select_upstream(probabilities: Tensor, density: Tensor) -> Tensor:
    """The original rule, ties and rounding included: per head, keep every entry of the map that is at least the k-th
    smallest, k = int((1 - density) * tiles**2). Rows may stay empty.

    probabilities: draft map [batch, heads, tiles, tiles].  density: kept share, float64 [heads].
    Returns bool [batch, heads, tiles, tiles].
    """
    entries = probabilities.shape[-1] ** 2
    k = ((1.0 - density.to(probabilities.device)) * entries).long()
    ascending = probabilities.flatten(2).sort(dim=-1).values
    threshold = ascending.gather(-1, (k - 1).clamp(min=0).expand(ascending.shape[0], -1)[..., None])
    kept = probabilities >= threshold[..., None]
    kept = kept | (k == 0)[:, None, None]
    return kept & (k < entries)[:, None, None]


def select(rule: str, probabilities: Tensor, density: Tensor, *, row_floor: float = 0.5) -> Tensor:
    """Apply a rule of SELECTIONS; see the functions above for shapes."""
    if rule == "draft":
        return select_draft(probabilities, density, row_floor=row_floor)
    if rule == "upstream":
        return select_upstream(probabilities, density)
    if rule == "full":
        return torch.ones_like(probabilities, dtype=torch.bool)
    raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {rule!r}")
