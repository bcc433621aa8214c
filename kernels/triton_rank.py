"""Rankings and lists of the probe on a GPU: which numbers of a row are the highest, and where marks stand.

A row is ranked in registers, as integers of the same order, by the bits of a bound.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

_ROUGH = tl.constexpr(12)  # bits of a bound that is an estimate anyway
_LEAST = tl.constexpr(-(2**31))
_NOTHING = tl.constexpr(-0x7F800001)  # -inf as `_ordered`


@triton.jit
def _ordered(x):
    """Floats as integers of the same order, NaN as -inf; its own inverse."""
    bits = tl.where(x == x, x, float("-inf")).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _reached(x, most, ROUGH: tl.constexpr):
    """The highest bound that `most` of the integers reach, but for its last ROUGH bits."""
    bound = tl.full((), _LEAST, tl.int32)
    bit = tl.full((), _LEAST, tl.int32)
    for _ in range(32 - ROUGH):
        higher = bound ^ bit
        bound = tl.where(tl.sum((x >= higher).to(tl.int32), 0) >= most, higher, bound)
        bit = (bit >> 1) & 0x7FFFFFFF
        bit = tl.where(bit == 0, 1, bit)
    return bound


@triton.jit
def _highest(x, most):
    """Which are the `most` highest, the first ones among equals."""
    bound = _reached(x, most, 0)
    equal = (x == bound).to(tl.int32)
    left = most - tl.sum((x > bound).to(tl.int32), 0)
    return (x > bound) | ((x == bound) & (tl.cumsum(equal, 0) <= left))


@triton.jit
def _worst(error_ptr, most_ptr, rows_ptr, keep_ptr, count, tiles, heads, SIZE: tl.constexpr):
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    own = tl.load(rows_ptr + row % count)
    x = _ordered(tl.load(error_ptr + row * tiles + lane, mask=lane < tiles, other=0.0))
    x = tl.where(lane < tiles, tl.where(lane == own, 0x7FFFFFFF, x), _LEAST)
    chosen = _highest(x, tl.load(most_ptr + row // count % heads * tiles + own))
    tl.store(keep_ptr + row * tiles + lane, chosen.to(tl.uint8), mask=lane < tiles)


@triton.jit
def _threshold(sample_ptr, threshold_ptr, samples, rank, SIZE: tl.constexpr):
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    x = _ordered(tl.load(sample_ptr + row * samples + lane, mask=lane < samples, other=float("-inf")))
    bound = tl.maximum(_reached(x, rank, _ROUGH), _NOTHING + 1)
    tl.store(threshold_ptr + row, (bound ^ ((bound >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True))


@triton.jit
def _ones(x):
    """How many bits are set: a pattern that compilers know."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def _marked(
    bits_ptr, before_ptr, slots_ptr, singles_ptr, taken_ptr, tiles, room,
    BLOCK: tl.constexpr, LANES: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Positions of the slots marked in a row, in their order and as long as there is room, then -1; and how many of
    each tile they are. before: place for the number of marks before each word. TOP: half the power of two that all
    words fit into."""
    row = tl.program_id(0).to(tl.int64)
    PER: tl.constexpr = BLOCK // 32
    words = tiles * PER
    bits_ptr += row * words
    before_ptr += row * words
    singles_ptr += row * room
    marks = 0
    for start in range(0, words, LANES):
        at = start + tl.arange(0, LANES)
        number = _ones(tl.load(bits_ptr + at, mask=at < words, other=0))
        before = marks + tl.cumsum(number, 0) - number
        tl.store(before_ptr + at, before, mask=at < words)
        in_tile = tl.sum(tl.minimum(number, tl.maximum(room - before, 0)).reshape(LANES // PER, PER), 1)
        tile = start // PER + tl.arange(0, LANES // PER)
        tl.store(taken_ptr + row * tiles + tile, in_tile.to(tl.uint8), mask=tile < tiles)
        marks += tl.sum(number, 0)
    tl.debug_barrier()
    for start in range(0, room, LANES):
        place = start + tl.arange(0, LANES)
        there = place < tl.minimum(marks, room)
        at = tl.zeros([LANES], tl.int32)  # the last word with no more marks before it than places before this one
        step = tl.full((), TOP, tl.int32)
        while step > 0:
            before = tl.load(before_ptr + at + step, mask=there & (at + step < words), other=0x7FFFFFFF)
            at = tl.where(before <= place, at + step, at)
            step = step >> 1
        rest = place - tl.load(before_ptr + at, mask=there, other=0)  # marks of the word that go first
        word = tl.load(bits_ptr + at, mask=there, other=0)
        slot = at * 32
        for bit in tl.static_range(5):
            number = _ones(word & ((1 << (16 >> bit)) - 1))
            above = rest >= number
            rest = tl.where(above, rest - number, rest)
            word = tl.where(above, word >> (16 >> bit), word)
            slot = tl.where(above, slot + (16 >> bit), slot)
        position = tl.load(slots_ptr + slot, mask=there, other=-1)
        tl.store(singles_ptr + place, position, mask=place < room)


@triton.jit
def _pick(error_ptr, slots_ptr, singles_ptr, keys, most, SIZE: tl.constexpr):
    """Positions of the `most` slots of the greatest error in a row, then -1."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    x = _ordered(tl.load(error_ptr + row * keys + lane, mask=lane < keys, other=float("-inf")))
    chosen = _highest(x, most) & (x > _NOTHING)
    position = tl.load(slots_ptr + lane, mask=chosen, other=-1)
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    singles_ptr += row * most
    tl.store(singles_ptr + place, position, mask=chosen)
    taken = tl.sum(chosen.to(tl.int32), 0)
    for start in range(0, most, SIZE):
        slot = start + lane
        tl.store(singles_ptr + slot, -1, mask=(slot >= taken) & (slot < most))
