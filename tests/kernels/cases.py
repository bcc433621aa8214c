"""Inputs that every kernel backend is tried on: grids that no axis divides, uneven rows, text on any side, padding."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from draftdiff.core.draft import Tail, pool
from draftdiff.core.grid import LatentGrid, Part, Tiling, tiling_for
from draftdiff.core.select import with_text
from draftdiff.kernels.problem import Problem
from tests.oracle import attention_of


@dataclass(frozen=True)
class KernelCase:
    name: str
    grid: tuple[int, int, int]
    tile: tuple[int, int, int]
    block_size: int
    text: int = 0
    lead: int = 0
    padded: bool = False
    density: float = 0.3
    batch: int = 2
    heads: int = 2
    empty_row: bool = False
    singles: int = 0
    others: tuple[Part, ...] = ()


EMPTY_ROW = KernelCase("an empty row", (2, 8, 16), (1, 8, 8), 64, density=0.2, empty_row=True)
KERNEL_CASES = [
    KernelCase("even tiles", (2, 8, 32), (1, 8, 16), 128),
    KernelCase("no axis divides", (5, 6, 9), (2, 4, 8), 64),
    KernelCase("small tiles in large blocks", (2, 7, 10), (1, 5, 5), 64),
    KernelCase("text last with padding", (3, 6, 11), (2, 4, 8), 64, text=77, padded=True),
    KernelCase("text first", (2, 9, 16), (1, 8, 16), 128, text=30, lead=30),
    KernelCase("text first with padding", (2, 9, 10), (1, 8, 8), 64, text=130, lead=130, padded=True),
    KernelCase("text around", (2, 9, 10), (1, 8, 8), 64, text=70, lead=33, padded=True),
    KernelCase("everything kept", (3, 9, 8), (1, 8, 8), 64, density=1.0, text=5),
    EMPTY_ROW,
    KernelCase("single tokens", (3, 9, 11), (2, 4, 8), 64, singles=40),
    KernelCase("single tokens beside padded text", (2, 9, 10), (1, 8, 8), 64, text=70, lead=33, padded=True, singles=9),
    KernelCase("all keys as single tokens", (2, 8, 16), (1, 8, 8), 64, density=0.2, empty_row=True, singles=256),
]
SEVERAL_GRIDS = [
    KernelCase(
        "a reference on either side of the picture and text between",
        (2, 9, 11),
        (2, 4, 8),
        64,
        text=40,
        lead=75,
        padded=True,
        others=(Part(5, LatentGrid(1, 7, 10), (1, 8, 8)), Part(290, LatentGrid(1, 8, 16), (1, 8, 8))),
    ),
    KernelCase(
        "a reference right behind the picture, single tokens",
        (1, 16, 16),
        (1, 8, 16),
        128,
        text=9,
        lead=9,
        singles=20,
        others=(Part(265, LatentGrid(1, 9, 17), (1, 16, 8)),),
    ),
]
KERNEL_CASES += SEVERAL_GRIDS
SMALL = KernelCase("few boxes, text last with padding", (2, 5, 9), (2, 4, 8), 64, text=77, padded=True)


def make(case: KernelCase, head_dim: int, dtype: torch.dtype, tail: bool) -> Problem:
    """The problem of a case, always the same."""
    generator = torch.Generator().manual_seed(len(case.name) * 1000 + head_dim)
    grid = LatentGrid(*case.grid)
    tiling: Tiling = tiling_for(grid, case.tile, case.block_size, case.text, case.lead, others=case.others)
    shape = (case.batch, tiling.tokens, case.heads, head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    q = q * 2
    v_tiles = tiling.video_tiles
    keep = torch.rand(case.batch, case.heads, v_tiles, v_tiles, generator=generator) < case.density
    if not case.empty_row:
        keep |= torch.eye(v_tiles, dtype=torch.bool)
    else:
        keep[:, :, 1] = False
    text_mask: Tensor | None = None
    if case.padded:
        valid = torch.tensor([case.text // 3, case.text - 1][: case.batch])
        text_mask = torch.arange(case.text) < valid[:, None]
    pooled = Tail(pool(k, tiling), pool(v, tiling)) if tail else None
    problem = Problem(q, k, v, with_text(keep, tiling), tiling, text_mask, pooled)
    return replace(problem, tokens=some_outside(problem, case.singles, generator)) if case.singles else problem


def some_outside(problem: Problem, most: int, generator: torch.Generator) -> Tensor:
    """Single tokens outside the kept tiles, for some query tiles fewer than for others: `Problem.tokens`."""
    tiling, tiles = problem.tiling, problem.tiling.video_tiles
    order = torch.rand(*problem.keep.shape[:2], tiles, tiling.tokens, generator=generator)
    order.masked_fill_(problem.keep[:, :, :tiles][..., problem.tile_of], -1.0)
    order[..., tiling.order[tiling.video_tokens :]] = -1.0
    chance, tokens = order.topk(min(most, tiling.tokens), dim=-1)
    few = torch.arange(most)[: tokens.shape[-1]] >= most // 2
    tokens = tokens.masked_fill(chance < 0, -1)
    tokens[:, :, 1::2] = tokens[:, :, 1::2].masked_fill(few, -1)
    return tokens.int()


def assert_attends(out: Tensor, lse: Tensor | None, problem: Problem) -> None:
    """Hold what a kernel gives against the oracle."""
    assert out.dtype == problem.q.dtype and out.is_contiguous()
    attention_of(problem).check(out.transpose(1, 2), None if lse is None else lse.transpose(1, 2))
