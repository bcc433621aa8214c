"""The token grid of one attention call, and its partition into tiles.

A tile is a small box of neighbouring video tokens: a rectangle inside a frame or a 3-D brick. Boxes are cut from the
grid's origin, so the last ones of an axis may be smaller: they are kept ragged, never padded with tokens of their own.
Text tokens follow the video tiles in tiles of their own, those before the video first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from draftdiff.core.values import is_whole, plain, shown
from draftdiff.errors import UserError

BLOCK_SIZES = (64, 128)


@dataclass(frozen=True)
class LatentGrid:
    """Video tokens of one attention call, in raster order (frame, row, column).

    frames, height, width: sizes in tokens, after the transformer's patching.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if not all(is_whole(size) and size >= 1 for size in self.shape):
            raise UserError(f"grid sizes must be positive whole numbers, got {shown(self.shape)}")

    @classmethod
    def of(cls, value: Any) -> LatentGrid:
        """A grid from itself or from three whole numbers. Raises ValueError for anything else."""
        if isinstance(value, cls):
            return value
        sizes = plain(value)
        if not isinstance(sizes, tuple) or len(sizes) != 3:
            raise UserError(f"grid must be (frames, height, width), got {shown(value)}")
        return cls(*sizes)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True, eq=False)
class Tiling:
    """A partition of a joint sequence (video and text tokens) into tiles of at most `block_size` tokens.

    grid: the video tokens.  tile: box in tokens (frames, rows, columns).  block_size: slots a tile has in a kernel.
    text: number of tokens outside the grid (text, references).  lead: how many of them stand before the video.

    Tiles are numbered video first (raster order of boxes), then text. Tensors, all on `device`:
    order [tokens] int64: model position of each token in tile order;  restore [tokens] int64: its inverse.
    counts [tiles] int64: real tokens of each tile;  slots [tiles, block_size] int64: model position per slot, -1 where
    the tile has no token.
    """

    grid: LatentGrid
    tile: tuple[int, int, int]
    block_size: int
    text: int
    lead: int
    device: torch.device
    order: Tensor = field(repr=False)
    restore: Tensor = field(repr=False)
    counts: Tensor = field(repr=False)
    slots: Tensor = field(repr=False)

    @property
    def boxes(self) -> tuple[int, int, int]:
        """Number of tiles along each axis of the grid."""
        frames, height, width = (math.ceil(n / t) for n, t in zip(self.grid.shape, self.tile))
        return frames, height, width

    @property
    def video_tiles(self) -> int:
        return math.prod(self.boxes)

    @property
    def tiles(self) -> int:
        return len(self.counts)

    @property
    def tokens(self) -> int:
        return self.grid.tokens + self.text

    def readable(self, text_mask: Tensor | None = None) -> Tensor:
        """Slots with a token that may be read as a key, bool [batch, tiles, block_size], batch 1 without text_mask.

        text_mask: bool [batch, text], False for padding.
        """
        filled = (self.slots >= 0)[None]
        if text_mask is None:
            return filled
        valid = torch.ones(len(text_mask), self.tokens, dtype=torch.bool, device=self.device)
        valid[:, self.order[self.grid.tokens :]] = text_mask
        return filled & valid[:, self.slots.clamp(min=0)]

    def video(self, x: Tensor) -> Tensor:
        """The video tokens of x [B, tokens, ...] as a view [B, frames, height, width, ...]."""
        return x[:, self.lead : self.lead + self.grid.tokens].unflatten(1, self.grid.shape)


@lru_cache(maxsize=32)
def tiling_for(
    grid: LatentGrid,
    tile: tuple[int, int, int],
    block_size: int,
    text: int = 0,
    lead: int = 0,
    device: torch.device | str = "cpu",
) -> Tiling:
    """Build (or fetch) the tiling of a grid. Tokens are in raster order inside a tile.

    Raises ValueError for a tile that has more tokens than block_size, an unknown block size, or lead > text.
    """
    if block_size not in BLOCK_SIZES:
        raise UserError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
    if len(tile) != 3 or min(tile) < 1 or math.prod(tile) > block_size:
        raise UserError(f"tile must be (frames, rows, columns) with at most {block_size} tokens, got {tile}")
    if not 0 <= lead <= text:
        raise UserError(f"lead must be between 0 and the {text} text tokens, got {lead}")

    axes = [torch.arange(n) // t for n, t in zip(grid.shape, tile)]
    boxes = [math.ceil(n / t) for n, t in zip(grid.shape, tile)]
    owner = (axes[0][:, None, None] * boxes[1] + axes[1][:, None]) * boxes[2] + axes[2]
    order = torch.argsort(owner.flatten(), stable=True) + lead
    counts = torch.bincount(owner.flatten())

    text_position = torch.arange(text)
    text_position[lead:] += grid.tokens
    # No text tile spans the video: its tokens stand side by side in memory.
    text_counts = torch.tensor(
        [min(block_size, size - start) for size in (lead, text - lead) for start in range(0, size, block_size)],
        dtype=torch.long,
    )
    order = torch.cat([order, text_position])
    counts = torch.cat([counts, text_counts])

    restore = torch.empty_like(order)
    restore[order] = torch.arange(len(order))
    starts = counts.cumsum(0) - counts
    slot = torch.arange(block_size)
    filled = slot < counts[:, None]
    slots = torch.where(filled, order[(starts[:, None] + slot).clamp(max=len(order) - 1)], -1)
    on_device = [t.to(device) for t in (order, restore, counts, slots)]
    return Tiling(grid, tile, block_size, text, lead, torch.device(device), *on_device)


@lru_cache(maxsize=256)
def choose_tile(grid: LatentGrid, block_size: int) -> tuple[int, int, int]:
    """The box of exactly block_size tokens that wastes the fewest slots on this grid and keeps its tokens close.

    Cost is the number of slots, times a weak penalty for long thin boxes: at equal waste a compact brick has the
    more alike tokens, hence the truer draft. Boxes are powers of two, so that a kernel can read one as a unit.
    """
    sizes = [2**i for i in range(block_size.bit_length())]
    boxes = [(t, h, w) for t in sizes for h in sizes for w in sizes if t * h * w == block_size]

    def cost(box: tuple[int, int, int]) -> float:
        slots = math.prod(math.ceil(n / b) * b for n, b in zip(grid.shape, box))
        # A frame of latents spans several video frames, so a step in time is a longer way than a step in space.
        surface = box[1] * box[2] + 2 * box[0] * (box[1] + box[2])
        return slots * surface**0.25

    return min(boxes, key=lambda box: (cost(box), box))
