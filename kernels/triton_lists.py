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
import torch.nn.functional as F
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor

from draftdiff.core.grid import Tiling

WHOLE, RAGGED, TEXT = range(3)
_MOST_TOKENS = 1023  # per axis, so that a corner packs into 32 bits


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, which need not be the one that holds x."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


@dataclass(frozen=True, eq=False)
class TileTables:
    """What a tiling is to the kernels, on its device.

    box: tile as a power-of-two box (frames, rows, columns) of block_size tokens, None if it is not one.
    slots [tiles, block_size] int32: model position of each slot, -1 for none; a box in raster order, holes included.
    kinds [tiles] int32: WHOLE, RAGGED or TEXT.  corners [video_tiles] int32: first
    token of a tile's box, packed.
    log2_tokens [video_tiles] fp32.
    """

    box: tuple[int, int, int] | None
    slots: Tensor
    kinds: Tensor
    corners: Tensor
    log2_tokens: Tensor


@lru_cache(maxsize=32)
def tables_for(tiling: Tiling) -> TileTables:
    """The tables of a tiling."""
    video, device = tiling.video_tiles, tiling.device
    is_box = (
        math.prod(tiling.tile) == tiling.block_size
        and all(n & (n - 1) == 0 for n in tiling.tile)
        and max(tiling.grid.shape) <= _MOST_TOKENS
    )
    slots = tiling.slots
    if is_box:
        positions = torch.arange(tiling.grid.tokens, device=device).view(tiling.grid.shape) + tiling.lead
        extra = [boxes * size - n for boxes, size, n in zip(tiling.boxes, tiling.tile, tiling.grid.shape)]
        positions = F.pad(positions, (0, extra[2], 0, extra[1], 0, extra[0]), value=-1)
        t, h, w = tiling.tile
        in_boxes = rearrange(positions, "(f t) (y h) (x w) -> (f y x) (t h w)", t=t, h=h, w=w)
        slots = torch.cat([in_boxes, slots[video:]])
    index = torch.arange(tiling.tiles, device=device)
    is_whole = (tiling.counts == tiling.block_size) & is_box
    kinds = torch.where(index < video, torch.where(is_whole, WHOLE, RAGGED), TEXT)
    index = index[:video]
    _, boxes_h, boxes_w = tiling.boxes
    frame, row, column = index // (boxes_h * boxes_w), index // boxes_w % boxes_h, index % boxes_w
    corners = frame * tiling.tile[0] << 20 | row * tiling.tile[1] << 10 | column * tiling.tile[2]
    return TileTables(
        box=tiling.tile if is_box else None,
        slots=slots.to(torch.int32).contiguous(),
        kinds=kinds.to(torch.int32),
        corners=corners.to(torch.int32),
        log2_tokens=tiling.counts[:video].log2().to(torch.float32),
    )


@dataclass(frozen=True, eq=False)
class TileLists:
    """The kept key tiles of each query tile.

    A row is a query tile of a head.  counts [rows, 3] int32: whole, ragged and text tiles.  lists [rows, tiles + 1]
    int32: their entries in this order, ascending in each; the rest is undefined.  order [batch * heads, tiles] int32:
    query tiles, longest first.  tail_bias [rows, video_tiles] fp32: log2 of the tokens of a skipped tile, -inf where
    it is kept.
    """

    counts: Tensor
    lists: Tensor
    order: Tensor
    tail_bias: Tensor


@triton.jit
def _compact(
    keep_ptr,
    kinds_ptr,
    entries_ptr,
    log2_counts_ptr,
    counts_row,
    counts_ptr,
    lists_ptr,
    tail_bias_ptr,
    tiles,
    video_tiles,
    SIZE: tl.constexpr,
    TAIL: tl.constexpr,
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
        tl.store(counts_ptr + row * 3 + wanted, number)
        taken += number
    if TAIL:
        video = tile < video_tiles
        bias = tl.load(log2_counts_ptr + row * counts_row + tile, mask=video, other=0.0)
        tl.store(tail_bias_ptr + row * video_tiles + tile, tl.where(keep, float("-inf"), bias), mask=video)


def list_tiles(
    keep: Tensor, tiling: Tiling, *, entries: Tensor, tail: bool, log_counts: Tensor | None = None
) -> TileLists:
    """Lists of keep, bool [batch, heads, tiles, tiles]. entries [tiles] int32: what stands for each tile.  log_counts:
    what a tile's mean stands for, [batch, heads, tiles, video_tiles], where that is not all of its tokens."""
    batch, heads, tiles, _ = keep.shape
    tables, rows, device = tables_for(tiling), batch * heads * tiles, keep.device
    counts = torch.empty((rows, 3), dtype=torch.int32, device=device)
    lists = torch.empty((rows, tiles + 1), dtype=torch.int32, device=device)
    tail_bias = torch.empty((rows, tiling.video_tiles) if tail else (1,), dtype=torch.float32, device=device)
    size = triton.next_power_of_2(tiles)
    log2_counts = tables.log2_tokens
    if log_counts is not None:
        log2_counts = (log_counts * math.log2(math.e)).contiguous()
    with on_device_of(counts):
        _compact[(rows,)](
            keep.contiguous().view(torch.uint8),
            tables.kinds,
            entries,
            log2_counts,
            0 if log_counts is None else tiling.video_tiles,
            counts,
            lists,
            tail_bias,
            tiles,
            tiling.video_tiles,
            SIZE=size,
            TAIL=tail,
            num_warps=4 if size <= 2048 else 8,
        )
    order = counts.sum(-1).view(batch * heads, tiles).argsort(dim=-1, descending=True).to(torch.int32)
    return TileLists(counts, lists, order, tail_bias)
