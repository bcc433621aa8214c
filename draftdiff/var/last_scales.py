"""The draft map at the last scales: a token reads the history wholly, of its own scale only what a draft chooses.

The history has no grid of its own (and ScaleKV is what cuts it), so for the kernel it stands beside the scale's grid as
text does in a video model. What is skipped counts through the pooled tail, as in draft attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftdiff.attention.attend import attend
from draftdiff.attention.rule import Rule
from draftdiff.core.devices import exact_dtype
from draftdiff.core.grid import LatentGrid
from draftdiff.errors import UserError

RULE = Rule(block_size=64)


@dataclass(frozen=True)
class LastScales:
    """density: kept share of the current scale's key tiles, in (0, 1].  min_tokens: smaller scales stay dense.
    scales: (height, width) of each."""

    density: float
    min_tokens: int
    scales: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        if isinstance(self.density, bool) or not 0 < self.density <= 1:
            raise UserError(f"density must be above 0 and at most 1, got {self.density!r}")
        if self.min_tokens < 1:
            raise UserError(f"min_tokens must be at least 1, got {self.min_tokens}")

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Height and width of the scale with so many tokens, None if it stays dense."""
        if tokens < self.min_tokens:
            return None
        return next(((h, w) for h, w in self.scales if h * w == tokens), None)


def attend_scale(
    query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], density: float, scale: float
) -> Tensor:
    """Attention of one scale, height x width = grid, in raster order.

    query: [batch, heads, tokens of the scale, head_dim].  key, value: [batch, heads, history + tokens, head_dim].
    scale: of the scores.  Returns the output like query.
    """
    q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    shares = torch.full((q.shape[2],), density, dtype=exact_dtype(q.device))
    lead = k.shape[1] - q.shape[1]
    return attend(q, k, v, shares, RULE, grid=LatentGrid(1, *grid), lead=lead, scale=scale)[0].transpose(1, 2)
