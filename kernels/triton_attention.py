"""Device code of the `triton` backend: a query tile walks its kept key tiles, read in place, with an online softmax.

A program owns one query tile of one head. It reads, in this order: whole video tiles (no mask), ragged video tiles and
text tiles (a bias per key, -inf where there is none), then the pooled tail. Softmax in base 2 with the scale folded in.

Video tiles are boxes of the model's own [frames, height, width] layout. With DESCRIPTORS a box is one bulk tensor load
(Hopper and later); otherwise its rows are addressed by arithmetic, or through a table of positions if the tile is no
box (GATHER). Entries of the tile lists are corners of boxes, packed by `triton_lists`, or tile numbers.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _step(
    q, k, v, bias, acc, row_max, row_sum, scale_log2, MASKED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr
):
    """One block of keys into the running softmax. bias [keys], in base 2, counts if MASKED."""
    if WIDEN:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = scores * scale_log2 + bias[None, :]
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row that has read nothing but hidden keys must not turn -inf - -inf into NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.math.exp2(scores - shift[:, None])
    else:
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        shift = new_max
        p = tl.math.exp2(scores * scale_log2 - shift[:, None])
    rescale = tl.math.exp2(row_max - shift)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def _part_corner(
    corner,
    part,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    PART_T: tl.constexpr,
    PART_H: tl.constexpr,
    PART_W: tl.constexpr,
):
    """First token (frame, row, column) of a part of a box: 10 bits each for row and column, the rest for the frame."""
    PER_H: tl.constexpr = BOX_H // PART_H
    PER_W: tl.constexpr = BOX_W // PART_W
    t = (corner >> 20) + part // (PER_H * PER_W) * PART_T
    y = (corner >> 10 & 1023) + part // PER_W % PER_H * PART_H
    x = (corner & 1023) + part % PER_W * PART_W
    return t, y, x


@triton.jit
def _overhang(start, size, extent):
    """0 if [start, start + size) lies inside [0, extent), 1 if its end is cut, 2 if nothing of it is inside."""
    return (start + size > extent).to(tl.int32) + (start >= extent).to(tl.int32)


@triton.jit
def forward(
    q_ptr,
    k_ptr,
    v_ptr,
    k_box,
    v_box,
    k_text,
    v_text,
    k_pool,
    v_pool,
    out_ptr,
    lse_ptr,
    query_slots_ptr,
    key_slots_ptr,
    starts_ptr,
    ragged_bias_ptr,
    text_bias_ptr,
    tail_bias_ptr,
    order_ptr,
    counts_ptr,
    lists_ptr,
    scale_log2,
    heads,
    tokens,
    tiles,
    video_tiles,
    lead,
    frames,
    height,
    width,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    outer_batch,
    outer_head,
    inner_head,
    key_slots_batch,
    text_bias_batch,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    PART_T: tl.constexpr,
    PART_H: tl.constexpr,
    PART_W: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    GATHER: tl.constexpr,
    RESUME: tl.constexpr,
    TEXT: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_BLOCK: tl.constexpr,
    LSE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
):
    """Grid: one program per (batch, head, query tile), a head's longest rows first. With RESUME, video rows go on from
    the output and log-sum-exp that `whole_tiles` left."""
    turn = tl.program_id(0)
    bh = turn // tiles
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    tile_q = tl.load(order_ptr + turn)
    row = bh * tiles + tile_q

    position = tl.load(query_slots_ptr + tile_q * BLOCK_M + tl.arange(0, BLOCK_M))
    dim = tl.arange(0, D_PAD)
    q = tl.load(
        q_ptr + b * q_batch + h * q_head + position.to(tl.int64)[:, None] * q_token + dim[None, :],
        mask=(position >= 0)[:, None] & (dim < D)[None, :],
        other=0.0,
    )
    if WIDEN:
        q = q.to(tl.float32)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    no_bias = tl.zeros([BLOCK_N], tl.float32)

    PARTS: tl.constexpr = TILE // BLOCK_N
    list_ptr = lists_ptr + row.to(tl.int64) * (tiles + 1)  # one more, for the entry that is fetched ahead
    whole = tl.load(counts_ptr + row * 3)
    begin = 0
    if RESUME:  # noqa: SIM102 (decided when compiled, the other when run)
        if tile_q < video_tiles:
            begin = whole * PARTS
            there = (position >= 0)[:, None] & (dim < D)[None, :]
            at = (b * tokens + position.to(tl.int64)) * heads + h
            acc = tl.load(out_ptr + at[:, None] * D + dim[None, :], mask=there, other=0.0).to(tl.float32)
            row_max = tl.load(lse_ptr + at, mask=position >= 0, other=float("-inf")) * 1.4426950408889634
            row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)
    if DESCRIPTORS:
        outer = (b * outer_batch + h * outer_head).to(tl.int32)
        inner = (h * inner_head).to(tl.int32)
        entry = tl.load(list_ptr)
        for i in tl.range(begin, whole * PARTS):
            corner = entry
            entry = tl.load(list_ptr + (i + 1) // PARTS)
            t, y, x = _part_corner(corner, i % PARTS, BOX_H, BOX_W, PART_T, PART_H, PART_W)
            k = k_box.load([outer, t, y, x, inner]).reshape(BLOCK_N, D_PAD)
            v = v_box.load([outer, t, y, x, inner]).reshape(BLOCK_N, D_PAD)
            acc, row_max, row_sum = _step(q, k, v, no_bias, acc, row_max, row_sum, scale_log2, False, PRECISION, WIDEN)

        list_ptr += whole
        ragged = tl.load(counts_ptr + row * 3 + 1)
        entry = tl.load(list_ptr)
        for i in tl.range(0, ragged * PARTS, num_stages=MASKED_STAGES):
            corner = entry
            entry = tl.load(list_ptr + (i + 1) // PARTS)
            t, y, x = _part_corner(corner, i % PARTS, BOX_H, BOX_W, PART_T, PART_H, PART_W)
            k = k_box.load([outer, t, y, x, inner]).reshape(BLOCK_N, D_PAD)
            v = v_box.load([outer, t, y, x, inner]).reshape(BLOCK_N, D_PAD)
            kind = _overhang(t, PART_T, frames) * 9 + _overhang(y, PART_H, height) * 3 + _overhang(x, PART_W, width)
            bias = tl.load(ragged_bias_ptr + kind * BLOCK_N + tl.arange(0, BLOCK_N))
            acc, row_max, row_sum = _step(q, k, v, bias, acc, row_max, row_sum, scale_log2, True, PRECISION, WIDEN)

        if TEXT:
            list_ptr += ragged
            text = tl.load(counts_ptr + row * 3 + 2)
            for i in tl.range(0, text * PARTS, num_stages=1):
                tile = tl.load(list_ptr + i // PARTS)
                first = i % PARTS * BLOCK_N
                start = tl.load(starts_ptr + tile) + first
                k = k_text.load([outer, start, inner]).reshape(BLOCK_N, D_PAD)
                v = v_text.load([outer, start, inner]).reshape(BLOCK_N, D_PAD)
                text_tile = (tile - video_tiles) * TILE + first
                bias = tl.load(text_bias_ptr + b * text_bias_batch + text_tile + tl.arange(0, BLOCK_N))
                acc, row_max, row_sum = _step(q, k, v, bias, acc, row_max, row_sum, scale_log2, True, PRECISION, WIDEN)
    else:
        slot = tl.arange(0, BLOCK_N)
        real_dim = (dim < D)[None, :]
        k_ptr += b * k_batch + h * k_head
        v_ptr += b * v_batch + h * v_head
        key_slots_ptr += b * key_slots_batch
        if not GATHER:
            in_part = slot // (PART_H * PART_W) * height * width + slot // PART_W % PART_H * width + slot % PART_W
            for i in tl.range(begin, whole * PARTS):
                corner = tl.load(list_ptr + i // PARTS)
                t, y, x = _part_corner(corner, i % PARTS, BOX_H, BOX_W, PART_T, PART_H, PART_W)
                at = (lead + (t * height + y) * width + x + in_part).to(tl.int64)[:, None]
                k = tl.load(k_ptr + at * k_token + dim[None, :], mask=real_dim, other=0.0)
                v = tl.load(v_ptr + at * v_token + dim[None, :], mask=real_dim, other=0.0)
                acc, row_max, row_sum = _step(
                    q, k, v, no_bias, acc, row_max, row_sum, scale_log2, False, PRECISION, WIDEN
                )
            list_ptr += whole
        masked = tl.load(counts_ptr + row * 3 + 1) + tl.load(counts_ptr + row * 3 + 2)
        for i in tl.range(0, masked * PARTS, num_stages=MASKED_STAGES):
            tile = tl.load(list_ptr + i // PARTS)
            at = tl.load(key_slots_ptr + tile * TILE + i % PARTS * BLOCK_N + slot)
            there = (at >= 0)[:, None] & real_dim
            k = tl.load(k_ptr + at.to(tl.int64)[:, None] * k_token + dim[None, :], mask=there, other=0.0)
            v = tl.load(v_ptr + at.to(tl.int64)[:, None] * v_token + dim[None, :], mask=there, other=0.0)
            bias = tl.where(at >= 0, 0.0, float("-inf"))
            acc, row_max, row_sum = _step(q, k, v, bias, acc, row_max, row_sum, scale_log2, True, PRECISION, WIDEN)

    if TAIL:
        tail_bias_ptr += row.to(tl.int64) * video_tiles
        if not DESCRIPTORS:
            k_pool += bh.to(tl.int64) * video_tiles * D
            v_pool += bh.to(tl.int64) * video_tiles * D
        for start in tl.range(0, video_tiles, TAIL_BLOCK, num_stages=MASKED_STAGES):
            pooled = start + tl.arange(0, TAIL_BLOCK)
            exists = pooled < video_tiles
            if DESCRIPTORS:
                k = k_pool.load([bh, start, 0]).reshape(TAIL_BLOCK, D_PAD)
                v = v_pool.load([bh, start, 0]).reshape(TAIL_BLOCK, D_PAD)
            else:
                there = exists[:, None] & (dim < D)[None, :]
                k = tl.load(k_pool + pooled[:, None] * D + dim[None, :], mask=there, other=0.0)
                v = tl.load(v_pool + pooled[:, None] * D + dim[None, :], mask=there, other=0.0)
            bias = tl.load(tail_bias_ptr + pooled, mask=exists, other=float("-inf"))
            acc, row_max, row_sum = _step(q, k, v, bias, acc, row_max, row_sum, scale_log2, True, PRECISION, WIDEN)

    _finish(
        acc, row_max, row_sum, out_ptr, lse_ptr, query_slots_ptr, tile_q, b, h, heads, tokens, BLOCK_M, D, D_PAD, LSE
    )


@triton.jit
def _finish(
    acc,
    row_max,
    row_sum,
    out_ptr,
    lse_ptr,
    query_slots_ptr,
    tile_q,
    b,
    h,
    heads,
    tokens,
    BLOCK_M: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    LSE: tl.constexpr,
):
    # Read again (volatile, so that it is): kept through the loops, the positions would cost registers.
    position = tl.load(query_slots_ptr + tile_q * BLOCK_M + tl.arange(0, BLOCK_M), volatile=True)
    filled = position >= 0
    dim = tl.arange(0, D_PAD)
    empty = row_sum == 0.0
    out = acc / tl.where(empty, 1.0, row_sum)[:, None]
    out_ptr += (b * tokens * heads + h) * D
    offsets = position.to(tl.int64)[:, None] * (heads * D) + dim[None, :]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=filled[:, None] & (dim < D)[None, :])
    if LSE:
        lse = (row_max + tl.math.log2(tl.where(empty, 1.0, row_sum))) * 0.6931471805599453
        lse = tl.where(empty, float("-inf"), lse)
        tl.store(lse_ptr + (b * tokens + position) * heads + h, lse, mask=filled)


@triton.jit
def whole_tiles(
    q_tiles_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    query_slots_ptr,
    order_ptr,
    counts_ptr,
    lists_ptr,
    scale_log2,
    batch,
    heads,
    tokens,
    tiles,
    video_tiles,
    lead,
    frames,
    height,
    width,
    k_batch,
    k_token,
    v_batch,
    v_token,
    TILE: tl.constexpr,
    D: tl.constexpr,
    BOX_T: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The loop over whole video tiles alone, with the loads in a warp group of their own (warp specialisation).

    Triton's pass takes one loop, fed by descriptors made in the kernel, and can split queries among warp groups only if
    they come as rows: q_tiles [batch, tiles * TILE, heads * D] is q in tile order. `forward` does the rest with
    RESUME. Heads must stand side by side in a token of k and v. Grid: (batch, head, query tile); text rows are left
    alone.
    """
    turn = tl.program_id(0)
    bh = turn // tiles
    b = bh // heads
    h = bh % heads
    tile_q = tl.load(order_ptr + turn)
    if tile_q < video_tiles:
        row = bh * tiles + tile_q
        inner = h * D
        columns = heads * D
        q_rows = tl.make_tensor_descriptor(q_tiles_ptr, [batch * tiles * TILE, columns], [columns, 1], [TILE, D])
        k_box = tl.make_tensor_descriptor(
            k_ptr + lead * k_token,
            [batch, frames, height, width, columns],
            [k_batch, height * width * k_token, width * k_token, k_token, 1],
            [1, BOX_T, BOX_H, BOX_W, D],
        )
        v_box = tl.make_tensor_descriptor(
            v_ptr + lead * v_token,
            [batch, frames, height, width, columns],
            [v_batch, height * width * v_token, width * v_token, v_token, 1],
            [1, BOX_T, BOX_H, BOX_W, D],
        )
        q = q_rows.load([(b * tiles + tile_q) * TILE, inner])
        if WIDEN:
            q = q.to(tl.float32)

        row_max = tl.full([TILE], float("-inf"), tl.float32)
        row_sum = tl.zeros([TILE], tl.float32)
        acc = tl.zeros([TILE, D], tl.float32)
        no_bias = tl.zeros([TILE], tl.float32)
        list_ptr = lists_ptr + row.to(tl.int64) * (tiles + 1)
        for i in tl.range(0, tl.load(counts_ptr + row * 3), warp_specialize=SPECIALIZE):
            entry = tl.load(list_ptr + i)
            t, y, x = entry >> 20, entry >> 10 & 1023, entry & 1023
            k = k_box.load([b, t, y, x, inner]).reshape(TILE, D)
            v = v_box.load([b, t, y, x, inner]).reshape(TILE, D)
            acc, row_max, row_sum = _step(q, k, v, no_bias, acc, row_max, row_sum, scale_log2, False, PRECISION, WIDEN)
        _finish(
            acc,
            row_max,
            row_sum,
            out_ptr,
            lse_ptr,
            query_slots_ptr,
            tile_q,
            b.to(tl.int64),
            h.to(tl.int64),
            heads,
            tokens,
            TILE,
            D,
            D,
            True,
        )
