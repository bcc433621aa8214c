"""Which layers look widely and which at the scale they work on, by the attention selectivity index of ScaleKV
(arXiv 2505.19602, section 3.2), and what each head misses of a history that is cut: measured on pictures in the making.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from draftdiff.core.importance import attention_mass, smooth
from draftdiff.errors import UserError
from draftdiff.var.cache import KVCache, Place
from draftdiff.var.head_budgets import SHARES
from draftdiff.var.scale_kv import WINDOW_SIDE, window

# The paper gives neither how many history tokens count as the strongest nor what share of (layer, scale) pairs is wide.
STRONGEST = 16
WIDE_SHARE = 0.07  # between what the authors' tables have for 2B and 8B
_ROWS = 64  # queries measured per scale, evenly spread


@dataclass
class Selectivity:
    """index: fp64 [layers, scales], the mean attention that queries give to their own scale times the mean they give
    to the strongest history tokens. Low: a layer that spreads its attention, a wide one. NaN where there is no history.
    missed: fp64 [layers, scales, heads, shares], the mean attention that the queries of a head miss at a scale if only
    the best of the history is left, by the ranking of ScaleKV after the scale before, at each share of it in
    head_budgets.SHARES. NaN likewise.
    """

    index: Tensor
    missed: Tensor | None = None

    def wide_layers(self, share: float = WIDE_SHARE) -> dict[int, tuple[int, ...]]:
        """Wide layers by scale: of all pairs the given share with the lowest z-score within their scale.

        Raises ValueError for a share outside [0, 1).
        """
        if not 0 <= share < 1:
            raise UserError(f"share of wide layers must be at least 0 and below 1, got {share}")
        centred = self.index - self.index.mean(0)
        z = centred / centred.std(0, correction=0).clamp(min=1e-12)
        pairs = int(share * int(z.isfinite().sum()))
        lowest = z.nan_to_num(nan=torch.inf).flatten().argsort(stable=True)[:pairs]
        found: dict[int, tuple[int, ...]] = dict.fromkeys(range(z.shape[1]), ())
        for pair in lowest.sort().values.tolist():
            layer, scale = divmod(pair, z.shape[1])
            found[scale] += (layer,)
        return found

    def drafters(self, share: float = WIDE_SHARE) -> dict[int, tuple[int, ...]]:
        """`wide_layers` by its old name."""
        warnings.warn("Selectivity.drafters is now wide_layers", FutureWarning, stacklevel=2)
        return self.wide_layers(share)


class SelectivityCache(KVCache):
    """A KVCache that measures selectivity, scale by scale; one forward per scale.

    scales: (height, width) of each.
    """

    def __init__(self, scales: Sequence[tuple[int, int]], key_dtype: torch.dtype | None = None) -> None:
        super().__init__(key_dtype)
        self.scales = scales
        self.measured: dict[Place, list[float]] = {}
        self.missed: dict[Place, list[Tensor]] = {}
        self._order: dict[Place, Tensor] = {}

    def observe(self, place: Place, query: Tensor, key: Tensor, raw_query: Callable[[], Tensor]) -> None:
        """Measure one layer at one scale."""
        new = query.shape[2]
        history = key.shape[2] - new
        value, missed = torch.nan, torch.full((query.shape[1], len(SHARES)), torch.nan, dtype=torch.float64)
        if history:
            rows = torch.linspace(0, new - 1, min(new, _ROWS), device=key.device).round().long()
            attention = (query[:, :, rows] @ key.transpose(-1, -2)).float().softmax(-1)
            past, current = attention.split([history, new], dim=-1)
            strongest = past.topk(min(STRONGEST, history), dim=-1).values.sum(-1)
            value = float(current.sum(-1).mean() * strongest.mean())
            gained = past.mean(2).gather(-1, self._order[place]).mean(0).double().cumsum(-1)
            counts = [round(share * history) for share in SHARES]
            missed = (gained[:, -1:] - F.pad(gained, (1, 0))[:, counts]).clamp(0, 1).cpu()  # fp32 sums may be above 1
        self.measured.setdefault(place, []).append(value)
        self.missed.setdefault(place, []).append(missed)
        if history + new < sum(height * width for height, width in self.scales):
            size = self.scales[len(self.missed[place]) - 1]
            window_at = window(size, min(WINDOW_SIDE, *size)).to(key.device)
            scores = smooth(attention_mass(query[:, :, window_at], key, scale=1.0))
            scores.index_fill_(-1, window_at + history, torch.inf)
            self._order[place] = scores.argsort(dim=-1, descending=True, stable=True)


def selectivity(caches: Sequence[SelectivityCache]) -> Selectivity:
    """The mean over several generations of the same model and schedule."""
    measured = [[cache.measured[layer] for layer in sorted(cache.measured)] for cache in caches]
    missed = [torch.stack([torch.stack(cache.missed[layer]) for layer in sorted(cache.missed)]) for cache in caches]
    return Selectivity(torch.tensor(measured, dtype=torch.float64).mean(0), torch.stack(missed).mean(0))
