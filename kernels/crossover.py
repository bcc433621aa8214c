"""The density from which dense attention is the faster one here, found by timing both."""

from __future__ import annotations

import time
from functools import lru_cache

import torch
import torch.nn.functional as F

from draftdiff.core.grid import LatentGrid, tiling_for
from draftdiff.core.select import BlockMask
from draftdiff.kernels.block_sparse import block_sparse_attention

# Enough work for the ratio to mean something: under a second on two CPU cores, milliseconds on a GPU.
_SIZES = {"cpu": (LatentGrid(8, 16, 32), 2), "cuda": (LatentGrid(16, 32, 32), 8)}
_ROUNDS = 3


@lru_cache(maxsize=32)
def dense_wins_above(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> float:
    """Density at which a sparse call takes as long as `scaled_dot_product_attention`, infinite where it never does.

    Time is taken as a straight line through densities 1/4 and 1, on random data. Measured once per process.
    """
    grid, heads = _SIZES.get(device.type, _SIZES["cuda"])
    tiling = tiling_for(grid, (1, 8, block_size // 8), block_size, device=device)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, grid.tokens, heads, head_dim, generator=generator).to(device, dtype)
    every = torch.ones(1, heads, tiling.tiles, tiling.tiles, dtype=torch.bool, device=device)
    quarter = every & (torch.arange(tiling.tiles, device=device) % 4 == 0)

    def sparse(keep: torch.Tensor) -> None:
        block_sparse_attention(q, k, v, BlockMask(keep), tiling=tiling, backend=backend)

    calls = (
        lambda: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))),
        lambda: sparse(quarter),
        lambda: sparse(every),
    )
    best = [float("inf")] * len(calls)
    for _ in range(1 + _ROUNDS):  # the first round warms up, and cannot be the fastest
        for index, call in enumerate(calls):
            start = _now(device)
            call()
            best[index] = min(best[index], _now(device) - start)
    dense, at_quarter, at_full = best
    slope = (at_full - at_quarter) / 0.75
    crossing = 1 - (at_full - dense) / slope if slope > 0 else float("inf")
    return crossing if crossing <= 1 else float("inf")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
