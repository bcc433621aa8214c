"""How one attention call is cut into tiles, which of them it keeps, and what computes them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from functools import lru_cache

import torch

from draftdiff.core.grid import BLOCK_SIZES, LatentGrid, Part, Tiling, choose_tile, tiling_for
from draftdiff.core.select import SELECTIONS
from draftdiff.core.values import is_whole, shown
from draftdiff.errors import UserError
from draftdiff.kernels.block_sparse import BACKENDS
from draftdiff.kernels.problem import PRECISIONS

_PAPERS_TILE = (1, 8, 16)


@dataclass(frozen=True)
class Rule:
    """The part of a configuration that one call needs; `DraftAttentionConfig` says what the fields mean.

    single: single tokens that a query tile reads, a number (int) or a share of all keys (float).
    packed: all of it in one value that a node of a compiled graph can hold; `unpack` reads it.
    Raises ValueError that names the value for anything that is not allowed.
    """

    selection: str = "draft"
    tail: bool = True
    single: int | float = 0.0
    tile: tuple[int, int, int] | None = None
    block_size: int | None = None
    backend: str = "auto"
    precision: str = "full"
    packed: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        def require(valid: bool, name: str, allowed: str) -> None:
            if not valid:
                raise UserError(f"{name} must be {allowed}, got {shown(getattr(self, name))}")

        known = (*SELECTIONS, "error")  # which is not by the map: `core.probe`
        require(self.selection in known, "selection", f"one of {', '.join(known)}")
        require(self.block_size in (None, *BLOCK_SIZES), "block_size", f"one of {BLOCK_SIZES}")
        if self.tile is not None:
            largest = self.block_size or max(BLOCK_SIZES)
            fits = len(self.tile) == 3 and all(is_whole(n) and n >= 1 for n in self.tile)
            fits = fits and math.prod(self.tile) <= largest
            require(fits, "tile", f"(frames, rows, columns) of at most {largest} tokens")
        elif self.selection == "upstream":
            require(
                self.block_size in (None, math.prod(_PAPERS_TILE)), "block_size", f"128 for the tile {_PAPERS_TILE}"
            )
        require(self.backend in ("auto", *BACKENDS), "backend", f"one of auto, {', '.join(BACKENDS)}")
        require(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        object.__setattr__(self, "packed", json.dumps(values))

    def singles_of(self, tokens: int) -> int:
        """How many single tokens a query tile reads in a call over so many video tokens."""
        wanted = round(self.single * tokens) if isinstance(self.single, float) else self.single
        return min(wanted, tokens)

    def tile_for(self, grid: LatentGrid) -> tuple[tuple[int, int, int], int]:
        """The tile and block size that a call over this grid uses."""
        tile = _PAPERS_TILE if self.tile is None and self.selection == "upstream" else self.tile
        if tile is not None:
            smallest = min(size for size in BLOCK_SIZES if size >= math.prod(tile))
            return tile, self.block_size or smallest
        block_size = self.block_size or (128 if grid.tokens >= 16_384 else 64)
        return choose_tile(grid, block_size), block_size

    def tiling(
        self,
        grid: LatentGrid,
        text: int,
        lead: int,
        device: torch.device,
        others: tuple[tuple[int, LatentGrid], ...] = (),
    ) -> Tiling:
        """Of a sequence with a grid behind `lead` tokens, `others` (their start, grid) and `text` tokens in none."""
        tile, block_size = self.tile_for(grid)
        fixed = self.tile is not None or self.selection == "upstream"
        parts = tuple(Part(at, other, tile if fixed else choose_tile(other, block_size)) for at, other in others)
        return tiling_for(grid, tile, block_size, text, lead, device, parts)


@lru_cache(maxsize=64)
def unpack(packed: str) -> Rule:
    values = json.loads(packed)
    return Rule(**values | {"tile": tuple(values["tile"]) if values["tile"] else None})
