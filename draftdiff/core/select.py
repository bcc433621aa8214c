"""From draft map and budget to the tiles that are computed.

`draft`: every query tile gets a floor of its best key tiles; what is left of the head's budget extends the rows whose
mass is least covered.  `upstream`: one threshold over the whole map of a head, as DraftAttention's authors
(arXiv 2505.14708, section 3.2) code it.  `full`: everything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from draftdiff.core.grid import Tiling
from draftdiff.errors import UserError

_BISECTIONS = 16  # resolves a covered mass to 2**-16, far below what one tile carries


def tile_lists(keep: Tensor) -> tuple[Tensor, Tensor]:
    """The kept key tiles of each query tile, in ascending order.

    keep: bool [batch, heads, tiles, key tiles].  Returns counts int32 [batch, heads, tiles] and indices int32 like
    keep; entries past the count are the skipped tiles, also ascending.
    """
    counts = keep.sum(-1, dtype=torch.int32)
    indices = torch.argsort(keep.to(torch.uint8), dim=-1, descending=True, stable=True).to(torch.int32)
    return counts, indices


def with_text(keep: Tensor, tiling: Tiling) -> Tensor:
    """keep over all tiles, bool [batch, heads, tiles, tiles], from that of the video tiles: text tiles, the last ones,
    read everything and are read by all."""
    video = tiling.video_tiles
    if tiling.tiles == video:
        return keep
    full = keep.new_ones(*keep.shape[:2], tiling.tiles, tiling.tiles)
    full[:, :, :video, :video] = keep
    return full


def select_draft(probabilities: Tensor, density: Tensor, *, row_floor: float = 0.5) -> Tensor:
    """Keep the best tiles of each row, under a budget per head.

    probabilities: draft map [batch, heads, tiles, tiles].  density: kept share, float64 [heads], on any device that
    has fp64.  row_floor: share of the budget that is dealt evenly to the rows (1: plain top-k, 0: plain top-p); each
    row keeps its own tile in any case. The rest goes to rows until all have covered the same mass; one of NaN gets
    nothing beyond its floor.
    Returns bool [batch, heads, tiles, tiles], without an empty row: at most max(density * tiles, 1) per row on average,
    less where the tiles left carry no mass.
    """
    tiles = probabilities.shape[-1]
    device = probabilities.device
    # Reckoned where the density is: the map's device need not have fp64.
    share = (density * tiles**2).clamp(min=tiles)[:, None, None]
    budget, floor = share.long().to(device), (row_floor * share / tiles).long().clamp(min=1).to(device)

    own = torch.eye(tiles, dtype=torch.bool, device=device)
    ranking = probabilities.nan_to_num(0.0).masked_fill_(own, 2.0).argsort(dim=-1, descending=True)
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
    smallest, k = int((1 - density) * tiles**2), and every NaN, which must not be lost. Rows may stay empty.

    probabilities: draft map [batch, heads, tiles, tiles].  density: kept share, float64 [heads], on any device.
    Returns bool [batch, heads, tiles, tiles].
    """
    entries = probabilities.shape[-1] ** 2
    k = ((1.0 - density) * entries).long().to(probabilities.device)
    ascending = probabilities.flatten(2).sort(dim=-1).values
    threshold = ascending.gather(-1, (k - 1).clamp(min=0).expand(ascending.shape[0], -1)[..., None])
    kept = ~(probabilities < threshold[..., None])
    kept = kept | (k == 0)[:, None, None]
    return kept & (k < entries)[:, None, None]


# By name: draft map and density to what is kept.
RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "draft": select_draft,
    "upstream": select_upstream,
    "full": lambda probabilities, _: torch.ones_like(probabilities, dtype=torch.bool),
}
SELECTIONS = tuple(RULES)


def select(rule: str, probabilities: Tensor, density: Tensor) -> Tensor:
    """Apply a rule of RULES; see the functions above for shapes. Raises ValueError for another name."""
    if rule not in RULES:
        raise UserError(f"selection must be one of {', '.join(RULES)}, got {rule!r}")
    return RULES[rule](probabilities, density)
