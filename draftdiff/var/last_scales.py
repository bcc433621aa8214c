"""The draft map at the last scales: a token reads the history wholly, of its own scale only what a draft chooses.

The history has no grid of its own (and ScaleKV is what cuts it), so for the kernel it stands beside the scale's grid as
text does in a video model. What is skipped counts through the pooled tail, as in draft attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftdiff.core.draft import Tail, draft_map, pool
from draftdiff.core.grid import LatentGrid, choose_tile, tiling_for
from draftdiff.core.select import select_draft
from draftdiff.kernels.block_sparse import block_sparse_attention
from draftdiff.kernels.problem import Problem

BLOCK_SIZE = 64


@dataclass(frozen=True)
class LastScales:
    """density: kept share of the current scale's key tiles, in (0, 1].  min_tokens: smaller scales stay dense.
    scales: (height, width) of each."""

    density: float
    min_tokens: int
    scales: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        if isinstance(self.density, bool) or not 0 < self.density <= 1:
            raise ValueError(f"density must be above 0 and at most 1, got {self.density!r}")
        if self.min_tokens < 1:
            raise ValueError(f"min_tokens must be at least 1, got {self.min_tokens}")

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
    shape = LatentGrid(1, *grid)
    history = key.shape[2] - shape.tokens
    tiling = tiling_for(shape, choose_tile(shape, BLOCK_SIZE), BLOCK_SIZE, history, history, query.device)
    # The rows of the history read nothing and cost nothing.
    q = torch.cat([query.new_zeros(*query.shape[:2], history, query.shape[3]), query], dim=2)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, key, value))
    q_mean, k_mean = pool(q, tiling), pool(k, tiling)
    probabilities = draft_map(q_mean, k_mean, scale=scale, counts=tiling.counts[: tiling.video_tiles])
    kept = select_draft(probabilities, torch.full((q.shape[2],), density, dtype=torch.float64))
    keep = kept.new_zeros(*kept.shape[:2], tiling.tiles, tiling.tiles)
    keep[:, :, : tiling.video_tiles] = True
    keep[:, :, : tiling.video_tiles, : tiling.video_tiles] = kept
    tail = Tail(k_mean, pool(v, tiling))
    out = block_sparse_attention(Problem(q, k, v, keep, tiling, tail=tail, scale=scale))
    return out[:, history:].transpose(1, 2)
