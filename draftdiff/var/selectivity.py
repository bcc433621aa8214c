"""Which layers look widely and which at the scale they work on: the attention selectivity index of ScaleKV
(arXiv 2505.19602, section 3.2), measured while pictures are generated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftdiff.errors import UserError
from draftdiff.var.cache import KVCache

# The paper gives neither how many history tokens count as the strongest nor what share of (layer, scale) pairs is wide.
STRONGEST = 16
WIDE_SHARE = 0.07  # between what the authors' tables have for 2B and 8B
_ROWS = 64  # queries measured per scale, evenly spread


@dataclass
class Selectivity:
    """index: fp64 [layers, scales], the mean attention that queries give to their own scale times the mean they give
    to the strongest history tokens. Low: a layer that spreads its attention, a wide one. NaN where there is no history.
    """

    index: Tensor

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
    """A KVCache that measures selectivity, scale by scale; one forward per scale."""

    def __init__(self, key_dtype: torch.dtype | None = None) -> None:
        super().__init__(key_dtype)
        self.measured: dict[int, list[float]] = {}

    def observe(self, layer: int, query: Tensor, key: Tensor, raw_query: Callable[[], Tensor]) -> None:
        """Measure one layer at one scale."""
        new = query.shape[2]
        history = key.shape[2] - new
        value = torch.nan
        if history:
            rows = torch.linspace(0, new - 1, min(new, _ROWS), device=key.device).round().long()
            attention = (query[:, :, rows] @ key.transpose(-1, -2)).float().softmax(-1)
            past, current = attention.split([history, new], dim=-1)
            strongest = past.topk(min(STRONGEST, history), dim=-1).values.sum(-1)
            value = float(current.sum(-1).mean() * strongest.mean())
        self.measured.setdefault(layer, []).append(value)


def selectivity(caches: Sequence[SelectivityCache]) -> Selectivity:
    """The mean over several generations of the same model and schedule."""
    measured = [[cache.measured[layer] for layer in sorted(cache.measured)] for cache in caches]
    return Selectivity(torch.tensor(measured, dtype=torch.float64).mean(0))
