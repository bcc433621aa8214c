"""Device code of `precision="int8"`: scores against video tiles in 8 bits, their values in fp16, summed in fp32.

For GPUs that multiply 16 bits with fp32 sums at half rate (GeForce). As in SageAttention2 (arXiv 2411.10958) the mean
key of a head is taken off the keys first, and what a query makes of it is added to its scores again, so that they are
those of the 16-bit parts: text, single tokens and the tail, which go as in `triton_attention`.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftdiff.core.grid import Tiling
from draftdiff.kernels.drafting import pool
from draftdiff.kernels.triton_attention import _finish, _nothing, _pooled, _queries, _singles, _slots
from draftdiff.kernels.triton_lists import on_device_of, tables_for

LARGEST = tl.constexpr(127.0)
# Weights up to 2^8 and values up to 1 leave fp16 the same room below both, and 128 products sum below its largest.
UP = tl.constexpr(8.0)
SMALLEST = tl.constexpr(1e-30)  # a scale that divides


@dataclass(frozen=True, eq=False)
class Packed:
    """q, k and v of a problem in tile order, 0 where a slot holds no token or head_dim is padded.

    q int8 [batch * heads, tiles, block_size, padded head_dim].  rows fp32 [batch * heads, tiles, 2, block_size]: what a
    query's scores are multiplied by, and what is added to them, in base 2.  k int8, v fp16 [batch * heads, first
    grid's tiles, block_size, padded head_dim].  scales fp32 [batch * heads, first grid's tiles, 2]: of k and v.
    """

    q: Tensor
    rows: Tensor
    k: Tensor
    v: Tensor
    scales: Tensor

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        return self.q, self.rows, self.k, self.v, self.scales


def mean_key(k: Tensor, tiling: Tiling, k_mean: Tensor | None) -> Tensor:
    """A key to take off all others of a head, fp32 [batch, heads, head_dim], finite whatever k holds.

    k_mean: means of the video tiles, if there are any.
    """
    means = pool(k, tiling) if k_mean is None else k_mean
    return (means.where(means.isfinite(), 0.0) / means.shape[-2]).sum(-2)


def pack(q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, off: Tensor, scale_log2: float) -> Packed:
    """off: `mean_key`.  scale_log2: of the scores, in base 2."""
    batch, _, heads, head_dim = q.shape
    padded, tiles, video = max(32, triton.next_power_of_2(head_dim)), tiling.tiles, tiling.video_tiles
    outer, block_size = batch * heads, tiling.block_size
    packed = Packed(
        q=torch.empty((outer, tiles, block_size, padded), dtype=torch.int8, device=q.device),
        rows=torch.empty((outer, tiles, 2, block_size), dtype=torch.float32, device=q.device),
        k=torch.empty((outer, video, block_size, padded), dtype=torch.int8, device=q.device),
        v=torch.empty((outer, video, block_size, padded), dtype=torch.float16, device=q.device),
        scales=torch.empty((outer, video, 2), dtype=torch.float32, device=q.device),
    )
    with on_device_of(q):
        quantise[(outer * tiles,)](
            q,
            k,
            v,
            off,
            tables_for(tiling).slots,
            packed=packed.pointers,
            scale_log2=scale_log2,
            shape=(heads, tiles, video),
            strides=tuple(x.stride()[:3] for x in (q, k, v)),
            TILE=block_size,
            D=head_dim,
            D_PAD=padded,
            num_warps=8,
        )
    return packed


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _nearest(x):
    return tl.floor(x + 0.5).to(tl.int8)


@triton.jit
def quantise(
    q_ptr, k_ptr, v_ptr, off_ptr, slots_ptr, packed, scale_log2, shape, strides,
    TILE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Grid: one program per (batch, head, tile). A query that is not finite, or a tile with such a key, gets a scale of
    NaN; values that are not finite stay.

    packed: pointers as `Packed` has them.  shape: heads, tiles, those of the video.  strides: of q, k and v.
    """
    q8_ptr, rows_ptr, k8_ptr, v16_ptr, scales_ptr = packed
    heads, tiles, video_tiles = shape
    q_at, k_at, v_at = strides
    row = tl.program_id(0)
    tile = row % tiles
    bh = row // tiles
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    slot = tl.arange(0, TILE)
    dim = tl.arange(0, D_PAD)
    position = tl.load(slots_ptr + tile * TILE + slot)
    there = (position >= 0)[:, None] & (dim < D)[None, :]
    off = tl.load(off_ptr + bh * D + dim, mask=dim < D, other=0.0)
    within = slot[:, None] * D_PAD + dim[None, :]

    q = _queries(q_ptr + b * q_at[0] + h * q_at[2], position, q_at[1], D, D_PAD).to(tl.float32) * scale_log2
    offset = tl.sum(q * off[None, :], 1)
    known = tl.min(_finite(q).to(tl.int32), 1) == 1
    q = tl.where(_finite(q), q, 0.0)
    scale = tl.maximum(tl.max(tl.abs(q), 1) / LARGEST, SMALLEST)
    tl.store(q8_ptr + row.to(tl.int64) * (TILE * D_PAD) + within, _nearest(q / scale[:, None]))
    rows_ptr += row.to(tl.int64) * (2 * TILE)
    tl.store(rows_ptr + slot, tl.where(known, scale, float("nan")))
    tl.store(rows_ptr + TILE + slot, offset)

    if tile < video_tiles:
        at = (bh * video_tiles + tile).to(tl.int64)
        token = position.to(tl.int64)[:, None]
        k = tl.load(k_ptr + b * k_at[0] + h * k_at[2] + token * k_at[1] + dim[None, :], mask=there, other=0.0)
        k = tl.where(there, k.to(tl.float32) - off[None, :], 0.0)
        known_keys = tl.min(tl.min(_finite(k).to(tl.int32), 1), 0) == 1
        k = tl.where(_finite(k), k, 0.0)
        k_scale = tl.maximum(tl.max(tl.max(tl.abs(k), 1), 0) / LARGEST, SMALLEST)
        tl.store(k8_ptr + at * (TILE * D_PAD) + within, _nearest(k / k_scale))
        v = tl.load(v_ptr + b * v_at[0] + h * v_at[2] + token * v_at[1] + dim[None, :], mask=there, other=0.0)
        v = v.to(tl.float32)
        v_scale = tl.maximum(tl.max(tl.max(tl.abs(tl.where(_finite(v), v, 0.0)), 1), 0), SMALLEST)
        tl.store(v16_ptr + at * (TILE * D_PAD) + within, (v / v_scale).to(tl.float16))
        tl.store(scales_ptr + at * 2, tl.where(known_keys, k_scale, float("nan")))
        tl.store(scales_ptr + at * 2 + 1, v_scale)


@triton.jit
def _step(q, factor, offset, k, v, v_scale, state):
    """One block of keys into the running softmax. factor, offset [queries]: from products to scores in base 2."""
    acc, row_max, row_sum = state
    products = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
    new_max = tl.maximum(row_max, tl.max(products, 1) * factor + offset)
    p = tl.math.exp2(products * factor[:, None] - (new_max - offset - UP)[:, None])
    rescale = tl.math.exp2(row_max - new_max)
    down = tl.math.exp2(-UP)
    row_sum = row_sum * rescale + tl.sum(p, 1) * down
    # GeForce sums products of fp16 in fp16 at full rate; only a step's are.
    here = tl.dot(p.to(tl.float16), v, out_dtype=tl.float16).to(tl.float32)
    return acc * rescale[:, None] + here * (v_scale * down), new_max, row_sum


@triton.jit
def _tiles(
    q, factor, offset, k8_ptr, v16_ptr, scales_ptr, list_ptr, count, state, TILE: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """The listed video tiles of one head, whose every slot holds a token."""
    acc, row_max, row_sum = state
    D_PAD: tl.constexpr = q.shape[1]
    PARTS: tl.constexpr = TILE // KEYS
    slot = tl.arange(0, KEYS)
    within = slot[:, None] * D_PAD + tl.arange(0, D_PAD)[None, :]
    for i in tl.range(0, count * PARTS):
        tile = tl.load(list_ptr + i // PARTS)
        first = tile * TILE + i % PARTS * KEYS
        k = tl.load(k8_ptr + first.to(tl.int64) * D_PAD + within)
        v = tl.load(v16_ptr + first.to(tl.int64) * D_PAD + within)
        k_scale = tl.load(scales_ptr + tile * 2)
        v_scale = tl.load(scales_ptr + tile * 2 + 1)
        acc, row_max, row_sum = _step(q, factor * k_scale, offset, k, v, v_scale, (acc, row_max, row_sum))
    return acc, row_max, row_sum


@triton.jit
def forward(
    q_ptr, k_ptr, v_ptr, k_pool, v_pool, out_ptr, lse_ptr, packed, tables, lists, singles, scale_log2, shape, strides,
    KEYS: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PARTIAL: tl.constexpr,
    SINGLES: tl.constexpr, TAIL: tl.constexpr, LSE: tl.constexpr, WIDEN: tl.constexpr, MASKED_STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: one program per (batch, head, query tile), a head's longest rows first.

    packed: pointers as `Packed` has them; others as in `triton_attention.forward`.  tables: pointers to query slots,
    key slots and biases of the tail.  singles: pointer to the positions of single tokens, the number of places of a
    row.  strides: of q, k and v, then the batch stride of the key slots.
    """
    q8_ptr, rows_ptr, k8_ptr, v16_ptr, scales_ptr = packed
    query_slots_ptr, key_slots_ptr, tail_bias_ptr = tables
    order_ptr, counts_ptr, list_ptr = lists
    at_ptr, places = singles
    heads, tokens, tiles, video_tiles, _, rows = shape
    q_at, k_at, v_at, slots_at = strides
    turn = tl.program_id(0)
    bh = turn // rows
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    tile_q = tl.load(order_ptr + turn)
    row = (bh * tiles + tile_q).to(tl.int64)
    list_ptr += row * (tiles + 1)
    counts_ptr += row * 4
    slot = tl.arange(0, TILE)
    full = tl.load(counts_ptr) + tl.load(counts_ptr + 1)

    q8 = tl.load(q8_ptr + row * (TILE * D_PAD) + slot[:, None] * D_PAD + tl.arange(0, D_PAD)[None, :])
    factor = tl.load(rows_ptr + row * (2 * TILE) + slot)
    offset = tl.load(rows_ptr + row * (2 * TILE) + TILE + slot)
    head = bh.to(tl.int64) * video_tiles
    k8_ptr += head * (TILE * D_PAD)
    v16_ptr += head * (TILE * D_PAD)
    scales_ptr += head * 2
    state = _tiles(q8, factor, offset, k8_ptr, v16_ptr, scales_ptr, list_ptr, full, _nothing(TILE, D_PAD), TILE, KEYS)

    if PARTIAL or SINGLES or TAIL:
        position = tl.load(query_slots_ptr + tile_q * TILE + slot)
        q = _queries(q_ptr + b * q_at[0] + h * q_at[2], position, q_at[1], D, D_PAD)
        if WIDEN:
            q = q.to(tl.float32)
    k_ptr += b * k_at[0] + h * k_at[2]
    v_ptr += b * v_at[0] + h * v_at[2]
    tokens_at = (k_at[1], v_at[1])
    even = 0
    rest = 0
    if SINGLES:
        at_ptr += (bh.to(tl.int64) * video_tiles + tl.minimum(tile_q, video_tiles - 1)) * places  # text reads none
        count = tl.load(counts_ptr + 3)
        even = count // KEYS * KEYS
        rest = (count > even).to(tl.int32)
        state = _singles(q, k_ptr, v_ptr, tokens_at, at_ptr, even, state, scale_log2, KEYS, D, MASKED_STAGES)
    if PARTIAL or SINGLES:
        partial = tl.load(counts_ptr + 2)
        state = _slots(
            q, k_ptr, v_ptr, tokens_at, list_ptr + full, partial, key_slots_ptr + b * slots_at, at_ptr + even,
            rest, state, scale_log2, TILE, KEYS, D, SINGLES, MASKED_STAGES,
        )  # fmt: skip
    if TAIL:
        tail_bias_ptr += row * video_tiles
        state = _pooled(
            q, k_pool, v_pool, bh, tail_bias_ptr, video_tiles, state, scale_log2, KEYS, D, False,
            MASKED_STAGES,
        )  # fmt: skip
    _finish(state, out_ptr, lse_ptr, query_slots_ptr, tile_q, b, h, heads, tokens, D, LSE)
