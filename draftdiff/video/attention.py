"""Draft attention: the whole method on one page.

DraftAttention (arXiv 2505.14708) on any grid, with per-row budgets and a pooled tail.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from draftdiff.core import quality
from draftdiff.core.draft import Tail, draft_map, softmax_scale
from draftdiff.core.grid import LatentGrid, tiling_for
from draftdiff.core.select import with_text
from draftdiff.kernels.block_sparse import block_sparse_attention
from draftdiff.kernels.drafting import pool, select
from draftdiff.kernels.problem import Problem
from draftdiff.video.config import DraftAttentionConfig

STATS = ("density", "drafted_mass")


class Clock(Protocol):
    """Measures named parts of a call."""

    def part(self, name: str) -> AbstractContextManager[None]: ...


class _NoClock:
    def part(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()


def draft_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: LatentGrid | tuple[int, int, int],
    config: DraftAttentionConfig | None = None,
    lead: int = 0,
    text_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention over video tokens (and text) that computes only the tiles a low-resolution draft finds worth it.

    q, k, v: [batch, tokens, heads, head_dim] after normalisation and rotary embedding, in the model's order.
    grid: (frames, height, width) of the video tokens, in raster order; all other tokens count as text, which is always
    computed.  lead: how many text tokens stand before the video.  text_mask: bool [batch, text], False for padding.
    Returns the output like q. Raises ValueError for shapes that do not fit.
    """
    grid = grid if isinstance(grid, LatentGrid) else LatentGrid(*grid)
    config = config or DraftAttentionConfig()
    density = config.budget.density(1, q.shape[2])[0]
    if config.budget.heads:
        density = density.to(q.device)
    else:  # made on the device: a copy from the host could not be captured in a CUDA graph
        density = torch.full((q.shape[2],), float(density[0]), dtype=torch.float64, device=q.device)
    if torch.compiler.is_compiling():
        tile = list(config.tile) if config.tile else None
        rule = (config.selection, config.row_floor, config.tail, tile, config.block_size, config.backend)
        return attend_op(q, k, v, density, text_mask, list(grid.shape), lead, scale, *rule)[0]
    return attend(q, k, v, density, grid=grid, config=config, lead=lead, text_mask=text_mask, scale=scale)[0]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    density: Tensor,
    *,
    grid: LatentGrid,
    config: DraftAttentionConfig,
    lead: int = 0,
    text_mask: Tensor | None = None,
    scale: float | None = None,
    clock: Clock | None = None,
) -> tuple[Tensor, Tensor]:
    """As `draft_attention`, for a budget already drawn up (float64 [heads]).

    Also returns what was done, fp32 [2]: density over all token pairs, and the mass the draft gives to the kept tiles;
    NaN if q or k hold a NaN.
    """
    clock = clock or _NoClock()
    text = q.shape[1] - grid.tokens
    if text < 0:
        raise ValueError(f"q has {q.shape[1]} tokens, fewer than the {grid.tokens} of the grid {grid}")
    tile, block_size = config.tile_for(grid)
    tiling = tiling_for(grid, tile, block_size, text, lead, q.device)
    scale = softmax_scale(scale, q.shape[-1])

    with clock.part("draft"):
        q_mean, k_mean = pool(q, tiling), pool(k, tiling)
        # The paper's map weighs all tiles alike, also ragged ones.
        counts = None if config.selection == "upstream" else tiling.counts[: tiling.video_tiles]
        probabilities = draft_map(q_mean, k_mean, scale=scale, counts=counts)
        tail = Tail(k_mean, pool(v, tiling)) if config.tail else None
    with clock.part("select"):
        keep = select(config.selection, probabilities, density, row_floor=config.row_floor)
        every = with_text(keep, tiling)
        stats = torch.stack([quality.density(every, tiling).mean(), quality.drafted_mass(probabilities, keep).mean()])
    with clock.part("kernel"):
        problem = Problem(q, k, v, every, tiling, text_mask, tail, scale)
        out = block_sparse_attention(problem, backend=config.backend)
    return out, stats


@torch.library.custom_op("draftdiff::attend", mutates_args=())
def attend_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    density: Tensor,
    text_mask: Tensor | None,
    grid: list[int],
    lead: int,
    scale: float | None,
    selection: str,
    row_floor: float,
    tail: bool,
    tile: list[int] | None,
    block_size: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`attend` as one node of a compiled graph."""
    config = DraftAttentionConfig(
        selection=selection,
        row_floor=row_floor,
        tail=tail,
        tile=(tile[0], tile[1], tile[2]) if tile else None,
        block_size=block_size,
        backend=backend,
    )
    return attend(q, k, v, density, grid=LatentGrid(*grid), config=config, lead=lead, text_mask=text_mask, scale=scale)


@attend_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, density: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(len(STATS), dtype=torch.float32)
