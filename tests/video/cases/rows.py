"""What cases of several families share, and tables of cases made into cases: those of models that are there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import diffusers
import torch

from tests.video.cases.base import HEAD_DIM, HEADS, TEXT, WIDTH, Asked, Grid, ModelCase, takes, tiny
from tests.video.cases.newer import IMAGE

Row = tuple[str, str, dict[str, Any], dict[str, Any], Any, dict[str, Any]]
REFERENCE = (8, 9)  # more than a tile has
BEHIND = REFERENCE[0] * REFERENCE[1]
GRID: Grid = (1, 15, 18)
TOKENS = math.prod(GRID)
SIZED: dict[str, Any] = {"dim": WIDTH, "n_heads": HEADS, "n_refiner_layers": 1, "n_layers": 2}
TEXT_AND_IMAGE: dict[str, Any] = IMAGE | {"text": (TEXT, TEXT)}


def noise(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cached(asked: Asked, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of so many tokens that have no queries."""
    keys, values = noise(2, asked.batch, tokens, HEADS, HEAD_DIM)
    return keys, values


def joint_flags(asked: Asked) -> torch.Tensor:
    """[batch, TEXT and image]: the text of odd batch items is padded."""
    return torch.cat(
        [asked.text_mask().bool(), torch.ones(asked.batch, math.prod(asked.grid), dtype=torch.bool)], dim=1
    )


REFERENCES_BEHIND: dict[str, Any] = IMAGE | {"text": (TEXT + BEHIND,) * 2}


def cases(table: list[Row], changes: dict[str, Callable[[Any], Any]] | None = None) -> list[ModelCase]:
    """changes: by name of a case, its build -> another."""
    found = []
    for name, model, config, inputs, pixels, more in table:
        if hasattr(diffusers, model) and takes(getattr(diffusers, model), inputs):
            build = tiny(getattr(diffusers, model), **config)
            change = (changes or {}).get(name)
            found.append(ModelCase(name, change(build) if change else build, inputs, pixels, **more))
    return found
