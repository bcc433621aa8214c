"""The probe (`core.probe`) on a GPU in few launches, with no value read by the host.

Mean queries are rounded as the model's own are, to the type of the keys. Scores are never held in memory: a sample of
the single keys is ranked, which gives a bound for the others, and those that reach it are marked, a bit for each.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftdiff.core.draft import Tail
from draftdiff.core.grid import Tiling
from draftdiff.core.probe import counts
from draftdiff.kernels.triton_backend import _widened
from draftdiff.kernels.triton_lists import STEP, on_device_of, tables_for
from draftdiff.kernels.triton_rank import _marked, _pick, _threshold, _worst

MOST = 8192  # tiles, or sampled keys: a row is ranked in registers
_GROUP = 32  # key tiles of one program
_LANES = 1024  # words of bits, or marks, at once
_HELD = 1 << 29  # bytes of sampled errors, or of what is ranked, at once
_HIGHEST = tl.constexpr(40 * math.log2(math.e))  # as in core.probe
_LN2 = tl.constexpr(math.log(2))
_LOG2E = tl.constexpr(math.log2(math.e))
_TINY = tl.constexpr(2.0**-120)  # square of an error, over that of the mean's weight, that is none


@triton.jit
def _values(
    v_ptr, mean_ptr, sums_ptr, slots_ptr, heads, tiles, strides,
    BLOCK: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Of each value its square, twice its product with its tile's mean, and that mean's square; 0 for an empty slot."""
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at, dim = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D_PAD)
    position = tl.load(slots_ptr + at).to(tl.int64)
    there = (position >= 0)[:, None] & (dim < D)[None, :]
    v_ptr += bh // heads * strides[0] + bh % heads * strides[2]
    v = tl.load(v_ptr + position[:, None] * strides[1] + dim[None, :], mask=there, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + (bh * tiles + tile) * D + dim, mask=dim < D, other=0.0)
    sums_ptr += bh * 3 * tiles * BLOCK + at
    tl.store(sums_ptr, tl.sum(v * v, 1))
    tl.store(sums_ptr + tiles * BLOCK, 2 * tl.sum(v * mean[None, :], 1))
    tl.store(sums_ptr + 2 * tiles * BLOCK, tl.where(position >= 0, tl.sum(mean * mean, 0), 0.0))


@triton.jit
def _queries(q_ptr, bh, rows, count, D: tl.constexpr, D_PAD: tl.constexpr, WIDEN: tl.constexpr):
    dim = tl.arange(0, D_PAD)
    mask = (rows < count)[:, None] & (dim < D)[None, :]
    q = tl.load(q_ptr + (bh * count + rows)[:, None] * D + dim[None, :], mask=mask, other=0.0)
    return q.to(tl.float32) if WIDEN else q


@triton.jit
def _squares(
    q, k_ptr, k_token, position, sums_ptr, at, keys, center, scale_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Squared errors of keys under their tiles' means over the squares of those means' weights, [rows, keys], but for
    rounding not negative; center: scores with the mean keys in base 2, to be broadcast to that shape."""
    dim = tl.arange(0, D_PAD)
    k_at = position.to(tl.int64)[:, None] * k_token + dim[None, :]
    k = tl.load(k_ptr + k_at, mask=(position >= 0)[:, None] & (dim < D)[None, :], other=0.0)
    if WIDEN:
        k = k.to(tl.float32)
    length, along, rest = tl.load(sums_ptr + at), tl.load(sums_ptr + keys + at), tl.load(sums_ptr + 2 * keys + at)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    above = tl.minimum(scores * scale_log2 - center, _HIGHEST, propagate_nan=tl.PropagateNan.ALL)
    weight = tl.math.exp2(above)
    return weight * (weight * length[None, :] - along[None, :]) + rest[None, :]


@triton.jit
def _error(center, square):
    """Twice the logarithm of a key's error, -inf for none, NaN for what is none."""
    return 2 * _LN2 * center + tl.log(tl.maximum(square, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _errors(
    q_ptr, k_ptr, center_ptr, sums_ptr, slots_ptr, error_ptr, heads, count, tiles, strides, scale_log2,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first, bh = tl.program_id(1) * GROUP, tl.program_id(2).to(tl.int64)
    q = _queries(q_ptr, bh, rows, count, D, D_PAD, WIDEN)
    k_ptr += bh // heads * strides[0] + bh % heads * strides[2]
    sums_ptr += bh * 3 * tiles * BLOCK
    center_ptr += bh * count * tiles
    error_ptr += bh * count * tiles
    to = rows * tiles
    for tile in range(first, tl.minimum(first + GROUP, tiles)):
        center = tl.load(center_ptr + to + tile, mask=rows < count, other=0.0)
        total = tl.zeros([ROWS], tl.float32)
        for part in tl.static_range(BLOCK // KEYS):
            at = tile * BLOCK + part * KEYS + tl.arange(0, KEYS)
            position = tl.load(slots_ptr + at)
            squares = _squares(
                q, k_ptr, strides[1], position, sums_ptr, at, tiles * BLOCK, center[:, None], scale_log2,
                D, D_PAD, PRECISION, WIDEN,
            )  # fmt: skip
            total += tl.sum(squares, 1)
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
        error = center * _LN2 + 0.5 * tl.log(total)
        tl.store(error_ptr + to + tile, error, mask=rows < count)


@triton.jit(do_not_specialize=["first"])
def _sample(
    q_ptr, k_ptr, center_ptr, sums_ptr, slots_ptr, sample_ptr, first, heads, count, tiles, strides, scale_log2,
    STRIDE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Errors of every STRIDE-th slot of a tile, from another one on in each tile."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part, local = tl.program_id(1) * GROUP, tl.program_id(2).to(tl.int64)
    bh = first + local
    q = _queries(q_ptr, bh, rows, count, D, D_PAD, WIDEN)
    k_ptr += bh // heads * strides[0] + bh % heads * strides[2]
    sums_ptr += bh * 3 * tiles * BLOCK
    center_ptr += bh * count * tiles
    PER: tl.constexpr = BLOCK // STRIDE
    samples = tiles * PER
    sample_ptr += local * count * samples
    for step in range(part, tl.minimum(part + GROUP, tl.cdiv(samples, KEYS))):
        sample = step * KEYS + tl.arange(0, KEYS)
        exists = (rows < count)[:, None] & (sample < samples)[None, :]
        tile = tl.minimum(sample // PER, tiles - 1)
        at = tile * BLOCK + sample % PER * STRIDE + tile % STRIDE
        position = tl.load(slots_ptr + at)
        center = tl.load(center_ptr + (rows * tiles)[:, None] + tile[None, :], mask=exists, other=float("-inf"))
        squares = _squares(
            q, k_ptr, strides[1], position, sums_ptr, at, tiles * BLOCK, center, scale_log2,
            D, D_PAD, PRECISION, WIDEN,
        )  # fmt: skip
        error = _error(center, squares)
        tl.store(sample_ptr + (rows * samples)[:, None] + sample[None, :], error, mask=exists)


@triton.jit(do_not_specialize=["first"])
def _mark(
    q_ptr, k_ptr, center_ptr, sums_ptr, slots_ptr, threshold_ptr, bits_ptr,
    first, heads, count, tiles, strides, scale_log2,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A bit for each slot: whether its error reaches the threshold of the row."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin, local = tl.program_id(1) * GROUP, tl.program_id(2).to(tl.int64)
    bh = first + local
    q = _queries(q_ptr, bh, rows, count, D, D_PAD, WIDEN)
    k_ptr += bh // heads * strides[0] + bh % heads * strides[2]
    sums_ptr += bh * 3 * tiles * BLOCK
    center_ptr += bh * count * tiles
    WORDS: tl.constexpr = KEYS // 32
    bits_ptr += local * count * tiles * (BLOCK // 32)
    threshold = tl.load(threshold_ptr + local * count + rows, mask=rows < count, other=float("inf"))
    slot, word = tl.arange(0, KEYS), tl.arange(0, WORDS)
    for tile in range(begin, tl.minimum(begin + GROUP, tiles)):
        center = tl.load(center_ptr + rows * tiles + tile, mask=rows < count, other=float("-inf"))
        least = tl.maximum(tl.math.exp2(threshold * _LOG2E - 2 * center), _TINY)
        for part in tl.static_range(BLOCK // KEYS):
            at = tile * BLOCK + part * KEYS + slot
            position = tl.load(slots_ptr + at)
            squares = _squares(
                q, k_ptr, strides[1], position, sums_ptr, at, tiles * BLOCK, center[:, None], scale_log2,
                D, D_PAD, PRECISION, WIDEN,
            )  # fmt: skip
            # Of a kept tile none: its center is -inf, which makes no bound.
            reaches = (squares >= least[:, None]) & (center > float("-inf"))[:, None]
            bits = reaches.to(tl.int32) << (slot % 32)[None, :]
            words = tl.sum(bits.reshape(ROWS, WORDS, 32), 2)
            to = (rows * tiles + tile)[:, None] * (BLOCK // 32) + part * WORDS + word[None, :]
            tl.store(bits_ptr + to, words, mask=(rows < count)[:, None])


class _Call:
    """What the kernels that score keys take: tensors, sizes and options."""

    def __init__(self, q_mean: Tensor, k: Tensor, v: Tensor, means: Tail, tiling: Tiling, scale: float) -> None:
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        batch, _, heads, dim = k.shape
        tiles, block, slots = tiling.video_tiles, tiling.block_size, tables_for(tiling).slots
        self.heads, self.tiles, self.of_all, self.slots = heads, tiles, batch * heads, slots
        self.count = q_mean.shape[2]
        self.keys = tiles * block
        full = k.dtype == torch.float32
        rows, keys, warps = (64, 32, 4) if full else (64, min(128, block), 4)
        self.blocks = triton.cdiv(self.count, rows)
        scale_log2 = scale * math.log2(math.e)
        q = q_mean.to(k.dtype).contiguous()
        # Of rounded queries, too: a key that is equal to the mean has to have its score.
        self.center = (q.float() * scale_log2) @ means.k_mean.mT
        sums = torch.empty((self.of_all, 3, self.keys), dtype=torch.float32, device=k.device)
        sizes = {"BLOCK": block, "D": dim, "D_PAD": max(16, triton.next_power_of_2(dim))}
        _values[(tiles, self.of_all)](
            v, means.v_mean.contiguous(), sums, slots, heads, tiles, v.stride()[:3], **sizes, num_warps=8
        )
        self.options = {
            "q_ptr": q,
            "k_ptr": k,
            "sums_ptr": sums,
            "slots_ptr": slots,
            "heads": heads,
            "count": self.count,
            "tiles": tiles,
            "strides": k.stride()[:3],
            "scale_log2": scale_log2,
            **sizes,
            "ROWS": rows,
            "KEYS": keys,
            "PRECISION": "tf32x3" if full and not torch.version.hip else "ieee",
            "WIDEN": _widened(k.dtype),
            "num_warps": warps,
        }


def errors(q_mean: Tensor, k: Tensor, v: Tensor, means: Tail, tiling: Tiling, *, scale: float) -> Tensor:
    """`core.probe.errors`, of q_mean rounded to the type of k."""
    with on_device_of(k):
        call = _Call(q_mean, k, v, means, tiling, scale)
        error = torch.empty_like(call.center)
        _errors[(call.blocks, triton.cdiv(call.tiles, _GROUP), call.of_all)](
            center_ptr=call.center, error_ptr=error, GROUP=_GROUP, **call.options
        )
    return error


def worst(error: Tensor, density: Tensor, rows: Tensor | None = None) -> Tensor:
    """`core.probe.worst`."""
    heads, tiles = error.shape[1], error.shape[-1]
    most = counts(density.to(error.device), tiles).to(torch.int32)
    rows = torch.arange(tiles, device=error.device) if rows is None else rows
    keep = torch.empty(error.shape, dtype=torch.bool, device=error.device)
    with on_device_of(error):
        _worst[(error.numel() // tiles,)](
            error.contiguous(), most, rows, keep.view(torch.uint8), len(rows), tiles, heads, **_ranked(tiles)
        )
    return keep


def singles(
    q_mean: Tensor, k: Tensor, v: Tensor, means: Tail, tiling: Tiling, keep: Tensor, *, scale: float, tokens: int
) -> tuple[Tensor, Tensor | None]:
    """`core.probe.singles`, of q_mean rounded to the type of k, and for a `Problem` how many are taken of each tile.

    Of more keys than MOST those are taken that reach what a sample of them sets as a bound: `tokens` on average, in a
    row more or fewer by the sample's chance. There is room for three standard deviations more. Of fewer keys it is not
    counted what is taken: None.
    """
    with on_device_of(k):
        call = _Call(q_mean, k, v, means, tiling, scale)
        center = call.center.masked_fill_(keep, float("-inf"))
        stride, rank, room = _plan(call.keys, tokens)
        found = torch.empty((*center.shape[:3], room), dtype=torch.int32, device=k.device)
        taken = torch.empty(center.shape, dtype=torch.uint8, device=k.device) if stride > 1 else None
        samples, words = call.keys // stride, call.keys // 32
        few = max(1, _HELD // (4 * call.count * max(samples, words)))
        for first in range(0, call.of_all, few):
            heads = min(few, call.of_all - first)
            rows, to = heads * call.count, found.view(call.of_all, call.count, room)[first:]
            error = torch.empty((rows, samples), dtype=torch.float32, device=k.device)
            few_keys = call.options | {"KEYS": min(call.options["KEYS"], 64)}  # each with a center of its own
            steps = triton.cdiv(samples, few_keys["KEYS"])
            _sample[(call.blocks, triton.cdiv(steps, _GROUP), heads)](
                center_ptr=center, sample_ptr=error, first=first, STRIDE=stride, GROUP=_GROUP, **few_keys
            )
            if taken is None:
                _pick[(rows,)](error, call.slots, to, samples, tokens, **_ranked(samples))
                continue
            threshold = torch.empty((rows,), dtype=torch.float32, device=k.device)
            _threshold[(rows,)](error, threshold, samples, rank, **_ranked(samples))
            bits = torch.empty((rows, words), dtype=torch.int32, device=k.device)
            _mark[(call.blocks, triton.cdiv(call.tiles, _GROUP), heads)](
                center_ptr=center,
                threshold_ptr=threshold,
                bits_ptr=bits,
                first=first,
                GROUP=_GROUP,
                **call.options,
            )
            _marked[(rows,)](
                bits,
                torch.empty_like(bits),
                call.slots,
                to,
                taken.view(call.of_all, call.count, call.tiles)[first:],
                call.tiles,
                room,
                BLOCK=tiling.block_size,
                LANES=_LANES,
                TOP=triton.next_power_of_2(words) // 2,
                num_warps=4,
            )
    return found, taken


def fits(tiling: Tiling) -> bool:
    """Whether a row of tiles has room in registers."""
    return tiling.video_tiles <= MOST


def _plan(keys: int, tokens: int) -> tuple[int, int, int]:
    """The stride of the sample, the rank in it that is the bound, and the room for what reaches that: a multiple of
    what `triton_attention` reads in a step."""
    stride = triton.next_power_of_2(triton.cdiv(keys, MOST))
    if stride == 1:
        return 1, 0, tokens
    rank = max(1, round(tokens / stride))
    room = min(keys, stride * (rank + 3 * math.sqrt(rank)))
    return stride, rank, math.ceil(room / STEP.value) * STEP.value


def _ranked(size: int) -> dict[str, int]:
    size = triton.next_power_of_2(size)
    return {"SIZE": size, "num_warps": min(16, max(1, size // 1024))}
