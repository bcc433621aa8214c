"""The token grids of one attention call, and their partition into tiles.

A tile is a small box of neighbouring video tokens: a rectangle inside a frame or a 3-D brick. Boxes are cut from the
grid's origin. What is left at its far ends, too thin for a box, is cut into strips, and these into tiles that are full:
a kernel multiplies empty slots, too, and padding every axis would cost a quarter of all work on a 720p grid.
A sequence may hold several grids, such as a picture and the references it is made after; what is in none counts as
text. Text tokens follow the video tiles in tiles of their own, in the order of the sequence.
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


@dataclass(frozen=True)
class Part:
    """A grid in a sequence: its first token stands at `start`, its boxes are `tile` (frames, rows, columns)."""

    start: int
    grid: LatentGrid
    tile: tuple[int, int, int]

    @property
    def stop(self) -> int:
        return self.start + self.grid.tokens

    @property
    def boxes(self) -> tuple[int, int, int]:
        """Number of boxes along each axis of the grid, whole ones alone."""
        frames, height, width = (n // t for n, t in zip(self.grid.shape, self.tile))
        return frames, height, width

    @property
    def left(self) -> int:
        """Number of tokens that are in no box."""
        return self.grid.tokens - math.prod(self.boxes) * math.prod(self.tile)

    def tiles(self, block_size: int) -> int:
        """Number of tiles: the boxes, then what is left in tiles of block_size."""
        return math.prod(self.boxes) + math.ceil(self.left / block_size)

    @property
    def order(self) -> Tensor:
        """Tokens of the grid in the order of its tiles, int64 [tokens]: box by box, then the far ends of frames, of
        rows and of columns, along strips as wide as a box and to and fro, so that neighbours follow one another."""
        frame, row, column = torch.meshgrid(*map(torch.arange, self.grid.shape), indexing="ij")
        box = [place // size for place, size in zip((frame, row, column), self.tile)]
        behind = [at >= most for at, most in zip(box, self.boxes)]
        end = torch.where(behind[0], 1, torch.where(behind[1], 2, torch.where(behind[2], 3, 0)))
        strip = torch.where(behind[0], box[1], box[0])
        along = torch.where(end == 3, row, column)
        most = max(self.grid.shape)
        along = torch.where(strip % 2 == 0, along, most - along)
        in_strips = (end * (most + 1) + strip) * (most + 1) + along + math.prod(self.boxes)
        in_boxes = (box[0] * self.boxes[1] + box[1]) * self.boxes[2] + box[2]
        return torch.argsort(torch.where(end == 0, in_boxes, in_strips).flatten(), stable=True)


@dataclass(frozen=True, eq=False)
class Tiling:
    """A partition of a joint sequence (video and text tokens) into tiles of at most `block_size` tokens.

    parts: the video tokens, one grid or more; the first is what kernels read best.  block_size: slots a tile has in a
    kernel.  text: number of tokens outside the grids.

    Tiles are numbered video first (part by part: its boxes in raster order, then its strips), then text. Tensors, all
    on `device`:
    order [tokens] int64: model position of each token in tile order;  restore [tokens] int64: its inverse.
    counts [tiles] int64: real tokens of each tile;  slots [tiles, block_size] int64: model position per slot, -1 where
    the tile has no token.
    """

    parts: tuple[Part, ...]
    block_size: int
    text: int
    device: torch.device
    order: Tensor = field(repr=False)
    restore: Tensor = field(repr=False)
    counts: Tensor = field(repr=False)
    slots: Tensor = field(repr=False)

    @property
    def grid(self) -> LatentGrid:
        """Of the first part."""
        return self.parts[0].grid

    @property
    def tile(self) -> tuple[int, int, int]:
        """Of the first part."""
        return self.parts[0].tile

    @property
    def lead(self) -> int:
        """Number of tokens before the first part."""
        return self.parts[0].start

    @property
    def boxes(self) -> tuple[int, int, int]:
        """Number of boxes along each axis of the first part, whole ones alone."""
        return self.parts[0].boxes

    @property
    def video_tiles(self) -> int:
        return sum(part.tiles(self.block_size) for part in self.parts)

    @property
    def tiles(self) -> int:
        return len(self.counts)

    @property
    def video_tokens(self) -> int:
        return sum(part.grid.tokens for part in self.parts)

    @property
    def tokens(self) -> int:
        return self.video_tokens + self.text

    def readable(self, text_mask: Tensor | None = None) -> Tensor:
        """Slots with a token that may be read as a key, bool [batch, tiles, block_size], batch 1 without text_mask.

        text_mask: bool [batch, text], False for padding.
        """
        filled = (self.slots >= 0)[None]
        if text_mask is None:
            return filled
        valid = torch.ones(len(text_mask), self.tokens, dtype=torch.bool, device=self.device)
        valid[:, self.order[self.video_tokens :]] = text_mask
        return filled & valid[:, self.slots.clamp(min=0)]


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a tensor made in inference mode is of no use to gradients, for which it is kept as well
def tiling_for(
    grid: LatentGrid,
    tile: tuple[int, int, int],
    block_size: int,
    text: int = 0,
    lead: int = 0,
    device: torch.device | str = "cpu",
    others: tuple[Part, ...] = (),
) -> Tiling:
    """Build (or fetch) the tiling of a sequence. Tokens are in raster order inside a box.

    lead: tokens before the grid, of whatever kind.  others: further grids.
    Raises ValueError for a tile that has more tokens than block_size, an unknown block size, or a grid that hangs over
    the sequence or another grid.
    """
    if block_size not in BLOCK_SIZES:
        raise UserError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
    parts = (Part(lead, grid, tile), *others)
    for part in parts:
        if len(part.tile) != 3 or min(part.tile) < 1 or math.prod(part.tile) > block_size:
            raise UserError(f"tile must be (frames, rows, columns) with at most {block_size} tokens, got {part.tile}")
    tokens = text + sum(part.grid.tokens for part in parts)
    if len(parts) == 1 and not 0 <= lead <= text:
        raise UserError(f"lead must be between 0 and the {text} text tokens, got {lead}")
    in_order = sorted(parts, key=lambda part: part.start)
    edges = [0, *(edge for part in in_order for edge in (part.start, part.stop)), tokens]
    if edges != sorted(edges):
        found = ", ".join(f"{part.grid} from {part.start}" for part in in_order)
        raise UserError(f"grids must not overlap or leave the sequence of {tokens} tokens, got {found}")

    orders, sizes = [], []
    for part in parts:
        orders.append(part.order + part.start)
        rest = [min(block_size, part.left - at) for at in range(0, part.left, block_size)]
        sizes.append(torch.tensor([math.prod(part.tile)] * math.prod(part.boxes) + rest))
    # No text tile spans a grid: its tokens stand side by side in memory.
    for start, stop in zip(edges[::2], edges[1::2]):
        orders.append(torch.arange(start, stop))
        sizes.append(torch.tensor([min(block_size, stop - at) for at in range(start, stop, block_size)]).long())
    order, counts = torch.cat(orders), torch.cat(sizes)

    restore = torch.empty_like(order)
    restore[order] = torch.arange(len(order))
    starts = counts.cumsum(0) - counts
    slot = torch.arange(block_size)
    filled = slot < counts[:, None]
    slots = torch.where(filled, order[(starts[:, None] + slot).clamp(max=len(order) - 1)], -1)
    on_device = [t.to(device) for t in (order, restore, counts, slots)]
    return Tiling(parts, block_size, text, torch.device(device), *on_device)


@lru_cache(maxsize=256)
def choose_tile(grid: LatentGrid, block_size: int) -> tuple[int, int, int]:
    """The box of exactly block_size tokens that keeps its tokens close and leaves few of the grid to strips.

    A compact brick has the more alike tokens, hence the truer draft; what boxes leave is in tiles nearly as compact,
    and counts a quarter more. Boxes are powers of two, so that a kernel can read one as a unit.
    """
    sizes = [2**i for i in range(block_size.bit_length())]
    boxes = [(t, h, w) for t in sizes for h in sizes for w in sizes if t * h * w == block_size]

    def cost(box: tuple[int, int, int]) -> float:
        left = Part(0, grid, box).left
        # A frame of latents spans several video frames, so a step in time is a longer way than a step in space.
        surface = box[1] * box[2] + 3 * box[0] * (box[1] + box[2])
        return (grid.tokens + left / 4) * surface**0.25

    return min(boxes, key=lambda box: (cost(box), box))
