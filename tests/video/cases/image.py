"""Image models."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel

from tests.video.cases.base import (
    CHANNELS,
    HEAD_DIM,
    HEADS,
    ROPE_AXES,
    TEXT,
    TEXT_WIDTH,
    Asked,
    ModelCase,
    packed,
    tiny,
)

IMAGE = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": ROPE_AXES,
}
INPUTS: dict[str, Any] = {
    "hidden_states": "B N C",
    "encoder_hidden_states": f"B {TEXT} {TEXT_WIDTH}",
    "timestep": lambda asked: asked.times(1e-3),
}


def flux_ids(height: int, width: int, image: int = 0) -> torch.Tensor:
    ids = torch.cartesian_prod(torch.tensor([image]), torch.arange(height), torch.arange(width))
    return ids.float()


FLUX_INPUTS = INPUTS | {
    "pooled_projections": "B 8",
    "img_ids": lambda asked: flux_ids(*asked.grid[1:]),
    "txt_ids": lambda _: torch.zeros(TEXT, 3),
    "guidance": lambda asked: torch.full((asked.batch,), 3.5),
}
QWEN_INPUTS = INPUTS | {
    "encoder_hidden_states_mask": Asked.text_mask,
    "img_shapes": lambda asked: [[(1, *asked.grid[1:])]] * asked.batch,
}

REFERENCE = (8, 9)  # more than a tile has
BEHIND = REFERENCE[0] * REFERENCE[1]
KONTEXT_INPUTS = FLUX_INPUTS | {
    "hidden_states": f"B N+{BEHIND} C",
    "img_ids": lambda asked: torch.cat([flux_ids(*asked.grid[1:]), flux_ids(*REFERENCE, image=1)]),
}
EDIT_INPUTS = QWEN_INPUTS | {
    "hidden_states": f"B N+{BEHIND} C",
    "img_shapes": lambda asked: [[(1, *asked.grid[1:]), (1, *REFERENCE)]] * asked.batch,
}
FLUX = tiny(FluxTransformer2DModel, **IMAGE, num_single_layers=2, pooled_projection_dim=8, guidance_embeds=True)
QWEN = tiny(QwenImageTransformer2DModel, **IMAGE)

IMAGE_CASES = [
    ModelCase(
        "flux",
        FLUX,
        FLUX_INPUTS,
        packed,
        grid=(1, 15, 18),
        layers=4,
        text=(TEXT, TEXT),
    ),
    ModelCase(
        "qwen_image",
        QWEN,
        QWEN_INPUTS,
        packed,
        grid=(1, 15, 18),
        text=(TEXT, TEXT),
    ),
    ModelCase(
        "flux_kontext",
        FLUX,
        KONTEXT_INPUTS,
        packed,
        grid=(1, 15, 18),
        layers=4,
        text=(TEXT + BEHIND,) * 2,
    ),
    ModelCase(
        "qwen_image_edit",
        QWEN,
        EDIT_INPUTS,
        packed,
        grid=(1, 15, 18),
        text=(TEXT + BEHIND,) * 2,
    ),
]
