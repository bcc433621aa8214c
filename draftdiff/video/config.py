"""All that a user can set about draft attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

from draftdiff.core.budget import Budget
from draftdiff.core.grid import BLOCK_SIZES, LatentGrid, choose_tile
from draftdiff.core.select import SELECTIONS
from draftdiff.kernels.block_sparse import BACKENDS


@dataclass(frozen=True)
class DraftAttentionConfig:
    """How much is computed, by which rule, and when.

    sparsity: share of video key tiles that a head skips, in [0, 1), or a `Budget` that spreads it over steps, layers
        and heads. Text is exact, so with much text the density over all tokens is above 1 - sparsity.
    selection: "draft" (per-row floor, then mass), "upstream" (the paper's rule: one threshold per head) or "full".
    row_floor: share of a head's budget that "draft" deals evenly to the rows, in [0, 1]; the rest follows the mass.
    tail: count skipped tiles through their mean key and value instead of dropping them.
    tile: box of tokens (frames, rows, columns); None chooses one per grid, (1, 8, 16) for "upstream".
    block_size: tokens of a tile, 64 or 128; None takes 128 from 16,384 video tokens on, where there are tiles enough.
    dense_steps: first denoising steps that stay dense, a number of steps (int) or a share of them (float in [0, 1]).
    dense_layers: attention layers that stay dense: the first n (int), or these indices (tuple).
    min_tokens: calls with fewer video tokens are left alone; None is 1,024 on a CPU and 8,192 on other devices, and
        also leaves alone layers whose density is so high that dense attention is faster (kernels.crossover).
    backend: "auto" or a name of `draftdiff.kernels.block_sparse.BACKENDS`.

    Raises ValueError that names the value for anything else.
    """

    sparsity: float | Budget = 0.75
    selection: str = "draft"
    row_floor: float = 0.5
    tail: bool = True
    tile: tuple[int, int, int] | None = None
    block_size: int | None = None
    dense_steps: int | float = 0.2
    dense_layers: int | tuple[int, ...] = 1
    min_tokens: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        def require(valid: bool, name: str, allowed: str) -> None:
            if not valid:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

        _ = self.budget
        require(self.selection in SELECTIONS, "selection", f"one of {', '.join(SELECTIONS)}")
        require(0 <= self.row_floor <= 1, "row_floor", "between 0 and 1")
        require(self.block_size in (None, *BLOCK_SIZES), "block_size", f"one of {BLOCK_SIZES}")
        if self.tile is not None:
            largest = self.block_size or max(BLOCK_SIZES)
            fits = len(self.tile) == 3 and min(self.tile) >= 1 and math.prod(self.tile) <= largest
            require(fits, "tile", f"(frames, rows, columns) of at most {largest} tokens")
        share = isinstance(self.dense_steps, float)
        require(
            0 <= self.dense_steps <= 1 if share else self.dense_steps >= 0,
            "dense_steps",
            "a number of steps (int, 0 or more) or a share (float between 0 and 1)",
        )
        layers = self.dense_layers if isinstance(self.dense_layers, tuple) else (self.dense_layers,)
        require(
            all(n >= 0 for n in layers), "dense_layers", "a number of layers or a tuple of layer indices, 0 or more"
        )
        require(self.min_tokens is None or self.min_tokens >= 0, "min_tokens", "0 or more")
        require(self.backend in ("auto", *BACKENDS), "backend", f"one of auto, {', '.join(BACKENDS)}")

    @property
    def budget(self) -> Budget:
        return self.sparsity if isinstance(self.sparsity, Budget) else Budget(self.sparsity)

    def tile_for(self, grid: LatentGrid) -> tuple[tuple[int, int, int], int]:
        """The tile and block size that a call over this grid uses."""
        tile = (1, 8, 16) if self.tile is None and self.selection == "upstream" else self.tile
        if tile is not None:
            smallest = min(size for size in BLOCK_SIZES if size >= math.prod(tile))
            return tile, self.block_size or smallest
        block_size = self.block_size or (128 if grid.tokens >= 16_384 else 64)
        return choose_tile(grid, block_size), block_size

    def is_dense_layer(self, index: int) -> bool:
        if isinstance(self.dense_layers, tuple):
            return index in self.dense_layers
        return index < self.dense_layers
