"""From what is kept to what the `triton` backend walks: lists of key tiles per query tile, built on the device.

No value of it is ever read by the host, so a call can be captured in a CUDA graph.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftdiff.core.grid import Tiling

BOX, FULL, PARTIAL = range(3)
STEP = tl.constexpr(128)  # the most keys of a step of `triton_attention.forward`
_SCAN = 1024  # single tokens at once
_MOST_TOKENS = 1023  # per axis, so that a corner packs into 32 bits


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, which need not be the one that holds x."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


@dataclass(frozen=True, eq=False)
class TileTables:
    """What a tiling is to the kernels, on its device.

    box: tile as a power-of-two box (frames, rows, columns) of block_size tokens, None if it is not one.
    slots [tiles, block_size] int32: model position of each slot, -1 for none.
    kinds [tiles] int32: BOX, those of the first grid; FULL, other tiles of video whose every slot holds a token;
    PARTIAL, all others, text among them.  corners [boxes] int32: first token of each box, packed.
    tokens [video_tiles] fp32: how many are in each.  tile_of [tokens] int32: the tile of each token.
    """

    box: tuple[int, int, int] | None
    slots: Tensor
    kinds: Tensor
    corners: Tensor
    tokens: Tensor
    tile_of: Tensor


@lru_cache(maxsize=32)
def tables_for(tiling: Tiling) -> TileTables:
    """The tables of a tiling."""
    is_box = (
        math.prod(tiling.tile) == tiling.block_size
        and all(n & (n - 1) == 0 for n in tiling.tile)
        and max(tiling.grid.shape) <= _MOST_TOKENS
    )
    index = torch.arange(tiling.tiles, device=tiling.device)
    tile_of = index.repeat_interleave(tiling.counts, output_size=tiling.tokens)[tiling.restore]
    boxes = math.prod(tiling.boxes) if is_box else 0
    is_full = (tiling.counts == tiling.block_size) & (index < tiling.video_tiles)
    kinds = torch.where(index < boxes, BOX, torch.where(is_full, FULL, PARTIAL))
    index = index[:boxes]
    _, height, width = (max(1, size) for size in tiling.boxes)
    frame, row, column = index // (height * width), index // width % height, index % width
    corners = frame * tiling.tile[0] << 20 | row * tiling.tile[1] << 10 | column * tiling.tile[2]
    return TileTables(
        box=tiling.tile if is_box else None,
        slots=tiling.slots.to(torch.int32).contiguous(),
        kinds=kinds.to(torch.int32),
        corners=corners.to(torch.int32),
        tokens=tiling.counts[: tiling.video_tiles].to(torch.float32),
        tile_of=tile_of.to(torch.int32),
    )


@dataclass(frozen=True, eq=False)
class TileLists:
    """The kept key tiles of each query tile.

    A row is a query tile of a head.  counts [rows, 4] int32: tiles of each kind, single tokens.
    lists [rows, tiles + 1] int32: the tiles' entries in this order, ascending in each; the rest is undefined.
    singles [rows of the video, any] int32: positions of single tokens, then -1 up to a multiple of STEP; the rest is
    undefined.  order [batch * heads, tiles with queries] int32: these, longest first.  tail_bias [rows, video_tiles]
    fp32: log2 of the tokens that a skipped tile's mean stands for, all but those read singly, -inf where there are none
    or the tile is kept.
    """

    counts: Tensor
    lists: Tensor
    singles: Tensor
    order: Tensor
    tail_bias: Tensor


@triton.jit
def _gathered(tokens_ptr, tile_of_ptr, singles_ptr, most, SIZE: tl.constexpr, SCAN: tl.constexpr):
    """Moves the tokens of a row together; how many they are, and how many of each tile."""
    number = 0
    in_tile = tl.zeros([SIZE], tl.int32)
    for start in range(0, most, SCAN):
        lane = start + tl.arange(0, SCAN)
        token = tl.load(tokens_ptr + lane, mask=lane < most, other=-1)
        there = token >= 0
        turn = number + tl.cumsum(there.to(tl.int32), 0) - 1
        tl.store(singles_ptr + turn, token, mask=there)
        number += tl.sum(there.to(tl.int32), 0)
        # The last bin is no tile's.
        in_tile += tl.histogram(tl.load(tile_of_ptr + token, mask=there, other=SIZE - 1), SIZE)
    behind = number + tl.arange(0, STEP)
    tl.store(singles_ptr + behind, -1, mask=behind < tl.cdiv(number, STEP) * STEP)
    return number, in_tile


@triton.jit
def _compact(
    keep_ptr,
    kinds_ptr,
    entries_ptr,
    held_ptr,
    tokens_ptr,
    tile_of_ptr,
    taken_ptr,
    counts_ptr,
    lists_ptr,
    singles_ptr,
    tail_bias_ptr,
    tiles,
    video_tiles,
    most,
    places,
    SIZE: tl.constexpr,
    TAIL: tl.constexpr,
    SINGLES: tl.constexpr,
    TAKEN: tl.constexpr,
    SCAN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, SIZE)
    exists = tile < tiles
    keep = tl.load(keep_ptr + row * tiles + tile, mask=exists, other=0) != 0
    kind = tl.load(kinds_ptr + tile, mask=exists, other=-1)
    entry = tl.load(entries_ptr + tile, mask=exists, other=0)
    taken = 0
    for wanted in tl.static_range(3):
        mine = (keep & (kind == wanted)).to(tl.int32)
        place = taken + tl.cumsum(mine, 0) - 1
        tl.store(lists_ptr + row * (tiles + 1) + place, entry, mask=mine != 0)
        number = tl.sum(mine, 0)
        tl.store(counts_ptr + row * 4 + wanted, number)
        taken += number
    video = tile < video_tiles
    singles = 0
    in_tile = tl.zeros([SIZE], tl.int32)
    of_video = row // tiles * video_tiles + row % tiles
    if SINGLES:  # noqa: SIM102 (decided when compiled, the other when run)
        if row % tiles < video_tiles:
            if TAKEN:
                in_tile = tl.load(taken_ptr + of_video * video_tiles + tile, mask=video, other=0).to(tl.int32)
                singles = tl.sum(in_tile, 0)
            else:
                singles, in_tile = _gathered(
                    tokens_ptr + of_video * most, tile_of_ptr, singles_ptr + of_video * places, most, SIZE, SCAN
                )
    tl.store(counts_ptr + row * 4 + 3, singles)
    if TAIL:
        left = tl.load(held_ptr + tile, mask=video, other=0.0) - in_tile.to(tl.float32)
        bias = tl.where(left > 0.0, tl.math.log2(tl.maximum(left, 1.0)), float("-inf"))
        tl.store(tail_bias_ptr + row * video_tiles + tile, tl.where(keep, float("-inf"), bias), mask=video)


def list_tiles(
    keep: Tensor,
    tiling: Tiling,
    *,
    entries: Tensor,
    tail: bool,
    tokens: Tensor | None = None,
    taken: Tensor | None = None,
    queries: Tensor | None = None,
) -> TileLists:
    """Lists of keep, bool [batch, heads, tiles, tiles], and of single tokens. entries [tiles] int32: what stands for
    each tile.  tokens, taken, queries: as a `Problem` has them."""
    batch, heads, tiles, _ = keep.shape
    tables, rows, device = tables_for(tiling), batch * heads * tiles, keep.device
    most = 0 if tokens is None else tokens.shape[-1]
    places = triton.cdiv(most, STEP.value) * STEP.value
    counts = torch.empty((rows, 4), dtype=torch.int32, device=device)
    lists = torch.empty((rows, tiles + 1), dtype=torch.int32, device=device)
    if tokens is None or not most:
        tokens, taken = counts, None
        singles = torch.empty((1, 1), dtype=torch.int32, device=device)
    elif taken is None:
        singles = torch.empty((batch * heads * tiling.video_tiles, places), dtype=torch.int32, device=device)
    else:
        singles = tokens.reshape(-1, most)
    tail_bias = torch.empty((rows, tiling.video_tiles) if tail else (1,), dtype=torch.float32, device=device)
    size = triton.next_power_of_2(tiles + 1 if most else tiles)
    with on_device_of(counts):
        _compact[(rows,)](
            keep.contiguous().view(torch.uint8),
            tables.kinds,
            entries,
            tables.tokens,
            tokens.contiguous(),
            tables.tile_of,
            counts if taken is None else taken.contiguous(),
            counts,
            lists,
            singles,
            tail_bias,
            tiles,
            tiling.video_tiles,
            most,
            places,
            SIZE=size,
            TAIL=tail,
            SINGLES=most > 0,
            TAKEN=taken is not None,
            SCAN=min(_SCAN, triton.next_power_of_2(max(most, 32))),
            num_warps=4 if size <= 2048 else 8,
        )
    lengths = counts[:, :3].sum(-1) * tiling.block_size + counts[:, 3]
    lengths = lengths.view(batch * heads, tiles)
    if queries is None:
        order = lengths.argsort(dim=-1, descending=True)
    else:
        order = queries[lengths[:, queries].argsort(dim=-1, descending=True)]
    order = order.to(torch.int32)
    return TileLists(counts, lists, singles, order, tail_bias)
