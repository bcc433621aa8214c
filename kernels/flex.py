"""The `flex` backend: PyTorch's FlexAttention with our tiles as its block mask; pooled tiles are extra keys.

Compiled on a GPU. On a CPU it runs unfused: a check of the other backends, not a way to go faster. There a v that is
not finite reaches all rows of its head.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from draftdiff.core.select import tile_lists
from draftdiff.kernels.problem import Problem
from draftdiff.kernels.torch_backend import from_tiles, to_tiles

differentiable = True
reads_tokens = False


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if not hasattr(flex, "AuxRequest"):
        return f"needs torch 2.9, here is {torch.__version__}"
    if device.type not in ("cpu", "cuda"):
        return f"runs on cpu and cuda, not on {device.type}"
    if device.type == "cuda" and head_dim & (head_dim - 1):
        return f"needs a head_dim that is a power of two, got {head_dim}"
    return None


# PyTorch's own choice for Hopper does not divide a block of 64: it refuses.
_OPTIONS = {64: dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"), 64)}


@lru_cache(maxsize=2)
def _attention(compiled: bool) -> Any:
    return torch.compile(flex.flex_attention, dynamic=False) if compiled else flex.flex_attention


def run(problem: Problem, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    q, tiling, keep, tail = problem.q, problem.tiling, problem.keep, problem.tail
    block, tiles, video = tiling.block_size, tiling.tiles, tiling.video_tiles
    readable, tile_keys = problem.readable.expand(q.shape[0], -1, -1), tiles * block
    q_tiles = to_tiles(q, tiling.slots).flatten(2, 3)
    k_tiles, v_tiles = (to_tiles(x, tiling.slots, ~readable).flatten(2, 3) for x in (problem.k, problem.v))

    whole = readable.all(-1)[:, None, None]
    readable = readable.flatten(1)
    full, partial = keep & whole, keep & ~whole
    log_counts = torch.zeros(1, device=q.device)
    if tail is not None:
        extra = -video % block
        k_tiles = torch.cat([k_tiles, F.pad(tail.k_mean, (0, 0, 0, extra)).to(q.dtype)], dim=2)
        v_tiles = torch.cat([v_tiles, F.pad(tail.v_mean, (0, 0, 0, extra)).to(q.dtype)], dim=2)
        log_counts = F.pad(problem.log_counts, (0, extra))
        tail_blocks = (video + extra) // block
        full = F.pad(full, (0, tail_blocks))
        partial = F.pad(partial, (0, tail_blocks), value=True)

    def is_read(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = query // block
        in_tile = keep[b, h, row, (key // block).clamp(max=tiles - 1)] & readable[b, key.clamp(max=tile_keys - 1)]
        pooled = key - tile_keys
        in_tail = ~keep[b, h, row, pooled.clamp(min=0, max=video - 1)] & (pooled < video)
        return torch.where(key < tile_keys, in_tile, in_tail)

    def weigh(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        pooled = key - tile_keys
        at = pooled.clamp(min=0)
        weight = log_counts[at] if log_counts.dim() == 1 else log_counts[b, h, query // block, at]
        return torch.where(pooled < 0, score, score + weight)

    block_mask = flex.BlockMask.from_kv_blocks(
        *tile_lists(partial),
        *tile_lists(full),
        BLOCK_SIZE=block,
        mask_mod=is_read,
        seq_lengths=(q_tiles.shape[2], k_tiles.shape[2]),
    )
    out, aux = _attention(q.device.type == "cuda")(
        q_tiles,
        k_tiles,
        v_tiles,
        score_mod=weigh if tail is not None else None,
        block_mask=block_mask,
        scale=problem.factor,
        kernel_options=_OPTIONS.get(block),
        return_aux=flex.AuxRequest(lse=True),
    )
    split = (tiles, block)
    lse = from_tiles(aux.lse.float().unflatten(2, split)[..., None], tiling)[..., 0] if want_lse else None
    return from_tiles(out.unflatten(2, split), tiling).to(q.dtype), lse
