"""Device code of the `triton` backend: a query tile walks its kept key tiles, read in place, with an online softmax.

A program owns one query tile of one head. It reads, in this order: boxes of video, other full tiles, partial ones and
text (a bias per key, -inf where there is none), single tokens, then the pooled tail. Softmax in base 2 with the scale
folded in.

Boxes lie in the model's own [frames, height, width] layout. With descriptors a box is one bulk tensor load (Hopper and
later), and what is no box is read from a copy; otherwise a box's rows are addressed by arithmetic, and the others
through a table of positions. Entries of the tile lists are corners of boxes, packed by `triton_lists`, or tile numbers.

`state` is the running softmax of a query tile: (sums of weighted values, largest score, sum of weights).
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TAIL_KEYS = tl.constexpr(64)  # the most pooled tiles per step: each has a bias


@triton.jit
def _step(q, k, v, bias, state, scale_log2, MASKED: tl.constexpr):
    """One block of keys into the running softmax. bias [keys], in base 2, counts if MASKED."""
    acc, row_max, row_sum = state
    k = k.to(q.dtype)
    v = v.to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
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
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, row_sum


@triton.jit
def _part_corner(corner, part, BOX: tl.constexpr, PART: tl.constexpr):
    """First token (frame, row, column) of a part of a box: 10 bits each for row and column, the rest for the frame."""
    PER_H: tl.constexpr = BOX[1] // PART[1]
    PER_W: tl.constexpr = BOX[2] // PART[2]
    t = (corner >> 20) + part // (PER_H * PER_W) * PART[0]
    y = (corner >> 10 & 1023) + part // PER_W % PER_H * PART[1]
    x = (corner & 1023) + part % PER_W * PART[2]
    return t, y, x


@triton.jit
def _boxes(
    q, k_box, v_box, outer, inner, list_ptr, parts, state, scale_log2, BOX: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """As many `parts` of the listed boxes, by descriptors."""
    acc, row_max, row_sum = state
    KEYS: tl.constexpr = PART[0] * PART[1] * PART[2]
    PARTS: tl.constexpr = BOX[0] * BOX[1] * BOX[2] // KEYS
    bias = tl.zeros([KEYS], tl.float32)
    entry = tl.load(list_ptr)
    for i in tl.range(0, parts):
        corner = entry
        entry = tl.load(list_ptr + (i + 1) // PARTS)
        t, y, x = _part_corner(corner, i % PARTS, BOX, PART)
        k = k_box.load([outer, t, y, x, inner]).reshape(KEYS, q.shape[1])
        v = v_box.load([outer, t, y, x, inner]).reshape(KEYS, q.shape[1])
        acc, row_max, row_sum = _step(q, k, v, bias, (acc, row_max, row_sum), scale_log2, False)
    return acc, row_max, row_sum


@triton.jit
def _rest(
    q, k_rest, v_rest, bh, list_ptr, parts, bias_ptr, boxes, state, scale_log2,
    TILE: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As many parts of the listed tiles that are no boxes [batch * heads, tiles * TILE, D], by descriptors; MASKED if
    they may have slots without a token."""
    acc, row_max, row_sum = state
    PARTS: tl.constexpr = TILE // KEYS
    bias = tl.zeros([KEYS], tl.float32)
    entry = tl.load(list_ptr)
    for i in tl.range(0, parts, num_stages=STAGES):
        start = (entry - boxes) * TILE + i % PARTS * KEYS
        entry = tl.load(list_ptr + (i + 1) // PARTS)
        k = k_rest.load([bh, start, 0]).reshape(KEYS, q.shape[1])
        v = v_rest.load([bh, start, 0]).reshape(KEYS, q.shape[1])
        if MASKED:
            bias = tl.load(bias_ptr + start + tl.arange(0, KEYS))
        acc, row_max, row_sum = _step(q, k, v, bias, (acc, row_max, row_sum), scale_log2, MASKED)
    return acc, row_max, row_sum


@triton.jit
def _box_rows(
    q, k_ptr, v_ptr, tokens_at, list_ptr, parts, video, state, scale_log2,
    BOX: tl.constexpr, PART: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """As many `parts` of the listed boxes by address. Entries are first tokens of boxes.
    tokens_at: strides of k and v; a box spans less than 2^31 elements."""
    acc, row_max, row_sum = state
    KEYS: tl.constexpr = PART[0] * PART[1] * PART[2]
    PARTS: tl.constexpr = BOX[0] * BOX[1] * BOX[2] // KEYS
    height, width = video[1], video[2]
    slot = tl.arange(0, KEYS)
    in_part = slot // (PART[1] * PART[2]) * height * width + slot // PART[2] % PART[1] * width + slot % PART[2]
    dim = tl.arange(0, q.shape[1])
    k_in_part = (in_part * tokens_at[0].to(tl.int32))[:, None] + dim[None, :]
    v_in_part = (in_part * tokens_at[1].to(tl.int32))[:, None] + dim[None, :]
    bias = tl.zeros([KEYS], tl.float32)
    for i in tl.range(0, parts):
        t, y, x = _part_corner(0, i % PARTS, BOX, PART)
        first = tl.load(list_ptr + i // PARTS).to(tl.int64) + (t * height + y) * width + x
        k = tl.load(k_ptr + first * tokens_at[0] + k_in_part, mask=(dim < D)[None, :], other=0.0)
        v = tl.load(v_ptr + first * tokens_at[1] + v_in_part, mask=(dim < D)[None, :], other=0.0)
        acc, row_max, row_sum = _step(q, k, v, bias, (acc, row_max, row_sum), scale_log2, False)
    return acc, row_max, row_sum


@triton.jit
def _slots(
    q, k_ptr, v_ptr, tokens_at, list_ptr, count, slots_ptr, singles_ptr, rest, state, scale_log2,
    TILE: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, SINGLES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The listed tiles, by a table of the positions of their slots, and if SINGLES `rest` (0 or 1) blocks of positions;
    -1 is none. tokens_at: strides of k and v."""
    acc, row_max, row_sum = state
    PARTS: tl.constexpr = TILE // KEYS
    slot = tl.arange(0, KEYS)
    dim = tl.arange(0, q.shape[1])
    for i in tl.range(0, count * PARTS + rest, num_stages=STAGES):
        at_ptr = slots_ptr + tl.load(list_ptr + i // PARTS) * TILE + i % PARTS * KEYS
        if SINGLES:
            at_ptr = tl.where(i < count * PARTS, at_ptr, singles_ptr)
        at = tl.load(at_ptr + slot)
        there = (at >= 0)[:, None] & (dim < D)[None, :]
        k = tl.load(k_ptr + at.to(tl.int64)[:, None] * tokens_at[0] + dim[None, :], mask=there, other=0.0)
        v = tl.load(v_ptr + at.to(tl.int64)[:, None] * tokens_at[1] + dim[None, :], mask=there, other=0.0)
        bias = tl.where(at >= 0, 0.0, float("-inf"))
        acc, row_max, row_sum = _step(q, k, v, bias, (acc, row_max, row_sum), scale_log2, True)
    return acc, row_max, row_sum


@triton.jit
def _singles(
    q, k_ptr, v_ptr, tokens_at, at_ptr, count, state, scale_log2,
    KEYS: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The tokens at `count` positions, a multiple of KEYS. tokens_at: strides of k and v."""
    acc, row_max, row_sum = state
    slot = tl.arange(0, KEYS)
    dim = tl.arange(0, q.shape[1])
    bias = tl.zeros([KEYS], tl.float32)
    for start in tl.range(0, count, KEYS, num_stages=STAGES):
        at = tl.load(at_ptr + start + slot).to(tl.int64)[:, None]
        k = tl.load(k_ptr + at * tokens_at[0] + dim[None, :], mask=(dim < D)[None, :], other=0.0)
        v = tl.load(v_ptr + at * tokens_at[1] + dim[None, :], mask=(dim < D)[None, :], other=0.0)
        acc, row_max, row_sum = _step(q, k, v, bias, (acc, row_max, row_sum), scale_log2, False)
    return acc, row_max, row_sum


@triton.jit
def _pooled(
    q, k_pool, v_pool, bh, bias_ptr, video_tiles, state, scale_log2,
    KEYS: tl.constexpr, D: tl.constexpr, DESCRIPTORS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The means of the video tiles [batch * heads, video_tiles, D], each with its bias."""
    acc, row_max, row_sum = state
    STEP: tl.constexpr = KEYS if KEYS < TAIL_KEYS else TAIL_KEYS  # `min` does not take constants before Triton 3.6
    dim = tl.arange(0, q.shape[1])
    if not DESCRIPTORS:
        k_pool += bh.to(tl.int64) * video_tiles * D
        v_pool += bh.to(tl.int64) * video_tiles * D
    for start in tl.range(0, video_tiles, STEP, num_stages=STAGES):
        pooled = start + tl.arange(0, STEP)
        exists = pooled < video_tiles
        if DESCRIPTORS:
            k = k_pool.load([bh, start, 0]).reshape(STEP, q.shape[1])
            v = v_pool.load([bh, start, 0]).reshape(STEP, q.shape[1])
        else:
            there = exists[:, None] & (dim < D)[None, :]
            k = tl.load(k_pool + pooled[:, None] * D + dim[None, :], mask=there, other=0.0)
            v = tl.load(v_pool + pooled[:, None] * D + dim[None, :], mask=there, other=0.0)
        bias = tl.load(bias_ptr + pooled, mask=exists, other=float("-inf"))
        acc, row_max, row_sum = _step(q, k, v, bias, (acc, row_max, row_sum), scale_log2, True)
    return acc, row_max, row_sum


@triton.jit
def _queries(q_ptr, position, q_token, D: tl.constexpr, D_PAD: tl.constexpr):
    """The queries at these positions of one head, 0 where there is none (-1)."""
    dim = tl.arange(0, D_PAD)
    there = (position >= 0)[:, None] & (dim < D)[None, :]
    return tl.load(q_ptr + position.to(tl.int64)[:, None] * q_token + dim[None, :], mask=there, other=0.0)


@triton.jit
def _nothing(ROWS: tl.constexpr, D_PAD: tl.constexpr):
    """The state before the first key."""
    return tl.zeros([ROWS, D_PAD], tl.float32), tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def _finish(state, out_ptr, lse_ptr, query_slots_ptr, tile_q, b, h, heads, tokens, D: tl.constexpr, LSE: tl.constexpr):
    acc, row_max, row_sum = state
    # Read again (volatile, so that it is): kept through the loops, the positions would cost registers.
    position = tl.load(query_slots_ptr + tile_q * acc.shape[0] + tl.arange(0, acc.shape[0]), volatile=True)
    filled = position >= 0
    dim = tl.arange(0, acc.shape[1])
    empty = row_sum == 0.0
    out = acc / tl.where(empty, 1.0, row_sum)[:, None]
    out_ptr += (b * tokens * heads + h) * D
    offsets = position.to(tl.int64)[:, None] * (heads * D) + dim[None, :]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=filled[:, None] & (dim < D)[None, :])
    if LSE:
        lse = (row_max + tl.math.log2(tl.where(empty, 1.0, row_sum))) * LN2
        lse = tl.where(empty, float("-inf"), lse)
        tl.store(lse_ptr + (b * tokens + position) * heads + h, lse, mask=filled)


@triton.jit
def forward(
    q_ptr, k, v, k_rest, v_rest, k_pool, v_pool, out_ptr, lse_ptr, tables, lists, singles, scale_log2,
    shape, video, strides, layout,
    KEYS: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BOX: tl.constexpr, PART: tl.constexpr,
    ACCESS: tl.constexpr, REST: tl.constexpr, PARTIAL: tl.constexpr, SINGLES: tl.constexpr, TAIL: tl.constexpr,
    LSE: tl.constexpr, WIDEN: tl.constexpr, MASKED_STAGES: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """Grid: one program per (batch, head, query tile), a head's longest rows first.

    k, v, k_pool, v_pool: descriptors if ACCESS is "descriptors", else pointers; k_rest, v_rest count for the former.
    tables: pointers to query slots, key slots, biases of what is no box, and of the tail.
    lists: pointers to order, counts, entries.  singles: pointers to the positions of single tokens, the number of
    places of a row, k and v.  shape: heads, tokens, tiles, those of the video, boxes, tiles with queries.
    video: frames, height, width.  strides: of q, k and v (batch, token, head), then the batch strides of the key slots
    and of what is no box.  layout: as `Interleave` has it, (outer per batch, outer per head, inner per head).
    """
    query_slots_ptr, key_slots_ptr, rest_bias_ptr, tail_bias_ptr = tables
    order_ptr, counts_ptr, list_ptr = lists
    heads, tokens, tiles, video_tiles, boxes, rows = shape
    q_at, k_at, v_at, tables_at = strides
    turn = tl.program_id(0)
    bh = turn // rows
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    tile_q = tl.load(order_ptr + turn)
    row = bh * tiles + tile_q

    position = tl.load(query_slots_ptr + tile_q * TILE + tl.arange(0, TILE))
    q = _queries(q_ptr + b * q_at[0] + h * q_at[2], position, q_at[1], D, D_PAD)
    if WIDEN:
        q = q.to(tl.float32)
    state = _nothing(TILE, D_PAD)

    # One name for one number, and the compiler forms offsets once.
    tokens_at = (k_at[1], k_at[1] if ALIKE else v_at[1])
    PARTS: tl.constexpr = TILE // KEYS
    list_ptr += row.to(tl.int64) * (tiles + 1)  # one more, for the entry that is fetched ahead
    of_boxes = tl.load(counts_ptr + row * 4)
    full = tl.load(counts_ptr + row * 4 + 1)
    partial = tl.load(counts_ptr + row * 4 + 2)
    at_ptr, places, k_rows, v_rows = singles
    even = 0
    rest = 0
    if SINGLES:
        at_ptr += (bh.to(tl.int64) * video_tiles + tl.minimum(tile_q, video_tiles - 1)) * places  # text reads none
        k_rows += b * k_at[0] + h * k_at[2]
        v_rows += b * v_at[0] + h * v_at[2]
        count = tl.load(counts_ptr + row * 4 + 3)
        even = count // KEYS * KEYS
        rest = (count > even).to(tl.int32)
    if ACCESS == "descriptors":
        outer = (b * layout[0] + h * layout[1]).to(tl.int32)
        inner = (h * layout[2]).to(tl.int32)
        state = _boxes(q, k, v, outer, inner, list_ptr, of_boxes * PARTS, state, scale_log2, BOX, PART)
        list_ptr += of_boxes
        if REST:
            state = _rest(
                q, k_rest, v_rest, bh, list_ptr, full * PARTS, rest_bias_ptr, boxes, state, scale_log2,
                TILE, KEYS, False, None,
            )  # fmt: skip
        if PARTIAL:
            state = _rest(
                q, k_rest, v_rest, bh, list_ptr + full, partial * PARTS, rest_bias_ptr + b * tables_at[1], boxes,
                state, scale_log2, TILE, KEYS, True, 1,
            )  # fmt: skip
        if SINGLES:
            state = _singles(q, k_rows, v_rows, tokens_at, at_ptr, even, state, scale_log2, KEYS, D, MASKED_STAGES)
            state = _slots(
                q, k_rows, v_rows, tokens_at, list_ptr, 0, key_slots_ptr, at_ptr + even, rest, state, scale_log2,
                TILE, KEYS, D, True, 1,
            )  # fmt: skip
    else:
        k += b * k_at[0] + h * k_at[2]
        v += b * v_at[0] + h * v_at[2]
        if ACCESS == "strided":
            state = _box_rows(q, k, v, tokens_at, list_ptr, of_boxes * PARTS, video, state, scale_log2, BOX, PART, D)
            list_ptr += of_boxes
        if SINGLES:
            state = _singles(q, k, v, tokens_at, at_ptr, even, state, scale_log2, KEYS, D, MASKED_STAGES)
        key_slots_ptr += b * tables_at[0]
        state = _slots(
            q, k, v, tokens_at, list_ptr, full + partial, key_slots_ptr, at_ptr + even, rest, state, scale_log2,
            TILE, KEYS, D, SINGLES, MASKED_STAGES,
        )  # fmt: skip
    if TAIL:
        tail_bias_ptr += row.to(tl.int64) * video_tiles
        DESCRIPTORS: tl.constexpr = ACCESS == "descriptors"
        state = _pooled(
            q, k_pool, v_pool, bh, tail_bias_ptr, video_tiles, state, scale_log2,
            KEYS, D, DESCRIPTORS, MASKED_STAGES,
        )  # fmt: skip
    _finish(state, out_ptr, lse_ptr, query_slots_ptr, tile_q, b, h, heads, tokens, D, LSE)
