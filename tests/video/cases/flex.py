"""Models that name FlexAttention as their backend: those that are there."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask

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
BUFFER: Grid = (4, 8, 9)  # a frame more than the reference has


def animate2_cache(asked: Asked) -> Any:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    frames, height, width = asked.grid
    cache, generator = WanAnimate2KVCache(len(asked.model.blocks)), torch.Generator().manual_seed(3)
    for layer in cache.layer_caches:
        shape = 2, asked.batch, (frames - 1) * height * width, HEADS, WIDTH // HEADS
        layer.store(*torch.randn(shape, generator=generator))
    return cache


def items(shape: Callable[[Asked], tuple[int, ...]], seed: int) -> Callable[[Asked], list[torch.Tensor]]:
    return lambda asked: list(torch.randn(asked.batch, *shape(asked), generator=torch.Generator().manual_seed(seed)))


def animate2_latents(asked: Asked) -> tuple[int, ...]:
    frames, height, width = asked.grid
    return 2, frames, 2 * height, 2 * width


ANIMATE2: dict[str, Any] = {
    "text_len": TEXT,
    "in_dim": CHANNELS,
    "dim": WIDTH,
    "ffn_dim": 32,
    "freq_dim": 16,
    "text_dim": TEXT_WIDTH,
    "out_dim": CHANNELS,
    "num_heads": HEADS,
    "num_layers": 2,
    "use_img_emb": False,
}
ANIMATE2_INPUTS: dict[str, Any] = {
    "hidden_states": items(animate2_latents, 1),
    "timestep": Asked.times,
    "encoder_hidden_states": items(lambda _: (TEXT, TEXT_WIDTH), 2),
    "condition_latents": items(animate2_latents, 4),
    "kv_cache": animate2_cache,
    "kv_cache_mode": lambda _: "cached",
    "seq_len": lambda asked: math.prod(asked.grid),
    "reference_grid_sizes": lambda asked: torch.tensor([[asked.grid[0] - 1, *asked.grid[1:]]] * asked.batch),
    "origin_len": lambda asked: 4 * (asked.grid[0] - 2),
    "origin_area": lambda asked: [16 * size for size in asked.grid[1:]],
}


def animate2_pixels(inputs: Inputs, grid: Grid, token: Grid) -> torch.Tensor:
    frame, row, column = token
    return inputs["hidden_states"][0][:, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]


def without_a_compiler(build: Any) -> Any:
    """It compiles what makes its mask."""

    def built() -> Any:
        model = build()
        module = sys.modules[type(model).__module__]
        code = type(model).create_mask.__code__
        names = vars(module) | {
            "create_block_mask": lambda *args, _compile, **kwargs: create_block_mask(*args, **kwargs)
        }
        model.create_mask = FunctionType(code, names).__get__(model)
        return model

    return built


def filled(tokens: int) -> int:
    return math.ceil(tokens / 128) * 128


OWN = filled(math.prod(BUFFER) * 3 // 4)
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
    (
        "wan_animate2",
        "WanAnimate2Transformer3DModel",
        ANIMATE2,
        ANIMATE2_INPUTS,
        animate2_pixels,
        {
            "grid": BUFFER,
            "text": (filled(math.prod(BUFFER)) - math.prod(BUFFER) + OWN,) * 2,
            "absent": OWN,
            "batched": False,
        },
    ),
]
FLEX_CASES = cases(TABLE, {"wan_animate2": without_a_compiler})
