"""Models that name FlexAttention as their backend: those that are there."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.video.cases.base import CHANNELS, HEADS, TEXT, TEXT_WIDTH, WIDTH, Asked, Grid, Inputs
from tests.video.cases.newer import WAN_LIKE
from tests.video.cases.rows import Row, cases

KANDINSKY: dict[str, Any] = {
    "in_visual_dim": 2,
    "out_visual_dim": CHANNELS,
    "time_dim": 16,
    "model_dim": WIDTH,
    "ff_dim": 32,
    "num_visual_blocks": 2,
    "axes_dims": (8, 12, 12),
    "nabla_threshold": 1.0,  # of its own sparse attention: all
}
KANDINSKY_INPUTS: dict[str, Any] = {"hidden_states": "B F 2*W H//2 5", "timestep": Asked.times}


def patches_of_8(_: Grid) -> Grid:
    """As many tokens as patches of 8 x 8 have, four in a frame."""
    return 2, 32, 8


def kandinsky_pixels(inputs: Inputs, grid: Grid, token: Grid) -> torch.Tensor:
    """Of a token that stands in its patch of 8 x 8."""
    frame, row, column = token
    patch_row, patch_column = divmod(row // 8, grid[1] // 16)
    return inputs["hidden_states"][:, frame, 8 * patch_row + row % 8, 8 * patch_column + column]


BLOCKS = (2, 1, 1)  # frames of the cached ones, of which the first is in coarse patches
COARSE, FINE = 24, 108


def padding(grid: Grid) -> int:
    """The processor fills queries up to a multiple of 128, and the keys with as many zeros, which it reads."""
    return -math.prod(grid) % 128


def far_cache(asked: Asked) -> dict[int, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)

    def noise(tokens: int) -> torch.Tensor:
        return torch.randn(2, asked.batch, HEADS, tokens, WIDTH // HEADS, generator=generator)

    _, height, width = asked.grid
    coarse = sum(BLOCKS[:1]) * (height // 2) * (width // 2)
    layers = range(len(asked.model.blocks))
    return {layer: {"compressed_cache": noise(coarse), "full_cache": noise(2 * height * width)} for layer in layers}


FAR_INPUTS: dict[str, Any] = {
    "hidden_states": "B F C 2*H 2*W",
    "timestep": Asked.times_per_frame,
    "r_timestep": lambda asked: asked.times_per_frame(0.5),
    "encoder_hidden_states": f"B {TEXT} {TEXT_WIDTH}",
    "chunk_partition": lambda asked: [*BLOCKS, asked.grid[0]],
    "kv_cache": far_cache,
    "kv_cache_flag": lambda _: {"num_cached_chunks": len(BLOCKS), "is_cache_step": False},
}


def far_pixels(inputs: Inputs, grid: Grid, token: Grid) -> torch.Tensor:
    frame, row, column = token
    return inputs["hidden_states"][:, frame, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]


GRID: Grid = (5, 6, 9)
TABLE: list[Row] = [
    (
        "kandinsky6_sr",
        "Kandinsky6SRTransformer3DModel",
        KANDINSKY,
        KANDINSKY_INPUTS,
        kandinsky_pixels,
        {"grid": patches_of_8(GRID), "fits": patches_of_8},
    ),
    (
        "anyflow_far",
        "AnyFlowFARTransformer3DModel",
        WAN_LIKE,
        FAR_INPUTS,
        far_pixels,
        {"grid": GRID, "text": (COARSE + FINE + padding(GRID),) * 2, "absent": COARSE + FINE, "batched": False},
    ),
]
FLEX_CASES = cases(TABLE)
