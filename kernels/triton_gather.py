"""The `triton` backend: one program per query tile walks the list of its kept key tiles with an online softmax.

Tokens are read where the model left them: a tile is a list of positions, so no permuted copy of q, k, v or the output
is made, and a ragged tile is a list with holes. Softmax in base 2 with the scale folded in.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from draftdiff.core.draft import Tail
from draftdiff.core.grid import Tiling
from draftdiff.core.select import BlockMask

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_TAIL_BLOCK = 64


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if triton is None:
        return "needs the package triton"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs a GPU (on {device.type} only with TRITON_INTERPRET=1)"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes fp32, fp16 and bf16, not {dtype}"
    if head_dim > 256:
        return f"takes head_dim up to 256, got {head_dim}"
    return None


if triton is not None:

    @triton.jit
    def _forward(  # type: ignore[no-untyped-def]
        q_ptr,
        k_ptr,
        v_ptr,
        out_ptr,
        lse_ptr,
        query_slots_ptr,
        key_slots_ptr,
        counts_ptr,
        indices_ptr,
        keep_ptr,
        k_mean_ptr,
        v_mean_ptr,
        log2_tokens_ptr,
        scale_log2,
        heads,
        tiles,
        video_tiles,
        tokens,
        q_batch,
        q_token,
        q_head,
        k_batch,
        k_token,
        k_head,
        v_batch,
        v_token,
        v_head,
        key_slots_batch,
        BLOCK: tl.constexpr,
        D: tl.constexpr,
        D_PAD: tl.constexpr,
        TAIL: tl.constexpr,
        TAIL_BLOCK: tl.constexpr,
        PRECISION: tl.constexpr,
        WIDEN: tl.constexpr,
    ):
        tile = tl.program_id(0)
        b = (tl.program_id(1) // heads).to(tl.int64)
        h = (tl.program_id(1) % heads).to(tl.int64)
        slot = tl.arange(0, BLOCK)
        dim = tl.arange(0, D_PAD)
        real_dim = dim < D

        position = tl.load(query_slots_ptr + tile * BLOCK + slot)
        filled = position >= 0
        rows = position.to(tl.int64)
        q = tl.load(
            q_ptr + b * q_batch + rows[:, None] * q_token + h * q_head + dim[None, :],
            mask=filled[:, None] & real_dim[None, :],
            other=0.0,
        )
        if WIDEN:
            q = q.to(tl.float32)
        row_max = tl.full([BLOCK], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK], tl.float32)
        acc = tl.zeros([BLOCK, D_PAD], tl.float32)

        row = ((b * heads + h) * tiles + tile).to(tl.int64)
        k_base = k_ptr + b * k_batch + h * k_head
        v_base = v_ptr + b * v_batch + h * v_head
        key_slots = key_slots_ptr + b * key_slots_batch
        for i in range(tl.load(counts_ptr + row)):
            key_tile = tl.load(indices_ptr + row * tiles + i)
            key_position = tl.load(key_slots + key_tile * BLOCK + slot)
            readable = key_position >= 0
            keys = key_position.to(tl.int64)
            loaded = readable[:, None] & real_dim[None, :]
            k = tl.load(k_base + keys[:, None] * k_token + dim[None, :], mask=loaded, other=0.0)
            v = tl.load(v_base + keys[:, None] * v_token + dim[None, :], mask=loaded, other=0.0)
            if WIDEN:
                k = k.to(tl.float32)
                v = v.to(tl.float32)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
            s = tl.where(readable[None, :], s, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(s, 1))
            # A tile of padding alone must not turn -inf - -inf into NaN.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.math.exp2(s - shift[:, None])
            rescale = tl.math.exp2(row_max - shift)
            row_sum = row_sum * rescale + tl.sum(p, 1)
            acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            row_max = new_max

        if TAIL:
            pooled_base = (b * heads + h) * video_tiles
            for start in range(0, video_tiles, TAIL_BLOCK):
                pooled = start + tl.arange(0, TAIL_BLOCK)
                exists = pooled < video_tiles
                kept = tl.load(keep_ptr + row * tiles + pooled, mask=exists, other=1)
                skipped = exists & (kept == 0)
                loaded = exists[:, None] & real_dim[None, :]
                offsets = (pooled_base + pooled)[:, None] * D + dim[None, :]
                k = tl.load(k_mean_ptr + offsets, mask=loaded, other=0.0).to(q.dtype)
                v = tl.load(v_mean_ptr + offsets, mask=loaded, other=0.0).to(q.dtype)
                log2_tokens = tl.load(log2_tokens_ptr + pooled, mask=exists, other=0.0)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + log2_tokens[None, :]
                s = tl.where(skipped[None, :], s, float("-inf"))
                new_max = tl.maximum(row_max, tl.max(s, 1))
                shift = tl.where(new_max == float("-inf"), 0.0, new_max)
                p = tl.math.exp2(s - shift[:, None])
                rescale = tl.math.exp2(row_max - shift)
                row_sum = row_sum * rescale + tl.sum(p, 1)
                acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
                row_max = new_max

        empty = row_sum == 0.0
        out = acc / tl.where(empty, 1.0, row_sum)[:, None]
        out_offsets = ((b * tokens + rows[:, None]) * heads + h) * D + dim[None, :]
        tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=filled[:, None] & real_dim[None, :])
        LN_2: tl.constexpr = 0.6931471805599453
        lse = tl.where(empty, float("-inf"), row_max * LN_2 + tl.log(tl.where(empty, 1.0, row_sum)))
        tl.store(lse_ptr + (b * tokens + rows) * heads + h, lse, mask=filled)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    tiling: Tiling,
    text_mask: Tensor | None,
    tail: Tail | None,
    scale: float,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    batch, tokens, heads, head_dim = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    query_slots = tiling.slots.to(torch.int32)
    key_slots = query_slots.where(tiling.readable(text_mask), -1)
    counts, indices = mask.lists()
    out = torch.empty((batch, tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, tokens, heads), dtype=torch.float32, device=q.device)
    pooled = (tail.k_mean.contiguous(), tail.v_mean.contiguous()) if tail is not None else (q, q)
    _forward[(tiling.tiles, batch * heads)](
        q,
        k,
        v,
        out,
        lse,
        query_slots,
        key_slots,
        counts,
        indices,
        mask.keep.to(torch.uint8),
        *pooled,
        tiling.counts.log2().to(torch.float32),
        scale * math.log2(math.e),
        heads,
        tiling.tiles,
        tiling.video_tiles,
        tokens,
        *(x.stride(axis) for x in (q, k, v) for axis in (0, 1, 2)),
        key_slots.stride(0) if len(key_slots) > 1 else 0,
        BLOCK=tiling.block_size,
        D=head_dim,
        D_PAD=max(16, 1 << (head_dim - 1).bit_length()),
        TAIL=tail is not None,
        TAIL_BLOCK=_TAIL_BLOCK,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        # The interpreter would multiply the bit patterns of bf16.
        WIDEN=q.dtype == torch.bfloat16 and q.device.type == "cpu",
        num_warps=8 if tiling.block_size == 128 else 4,
        num_stages=2,
    )
    return out, lse if want_lse else None
