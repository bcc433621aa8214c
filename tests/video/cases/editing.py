"""Models that edit images which stand in their sequence or in a cache: Qwen-Image 2.1, GLM-Image, JoyImage-Edit."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.video.cases.base import (
    CHANNELS,
    HEADS,
    ROPE_AXES,
    TEXT,
    TEXT_WIDTH,
    WIDTH,
    Asked,
    Grid,
    Inputs,
    last_packed,
    packed,
    patch,
)
from tests.video.cases.newer import IMAGE, JOINT, PICTURE_OF_PATCHES, of_picture
from tests.video.cases.rows import BEHIND, REFERENCE, REFERENCES_BEHIND, TEXT_AND_IMAGE, TOKENS, Row, cached, cases


def even(grid: Grid) -> Grid:
    frames, height, width = grid
    return frames, height + height % 2, width + width % 2


def qwen21_mask(asked: Asked) -> torch.Tensor:
    """Text, slots of an image to edit, text; and slots of the new image."""
    slots = [False] * 4 + [True] * (BEHIND // 4) + [False] * (TEXT - 4)
    return torch.tensor([slots + [True] * (math.prod(asked.grid) // 4)]).expand(asked.batch, -1)


def qwen21_cache(asked: Asked) -> Any:
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    cache = QwenImage21KVCache(len(asked.model.transformer_blocks))
    for layer in cache.layer_caches:
        layer.store(*cached(asked, TEXT + BEHIND))
    return cache


QWEN21 = JOINT | {"out_channels": CHANNELS, "context_in_dim": TEXT_WIDTH, "axes_dims_rope": ROPE_AXES}
QWEN21_INPUTS: dict[str, Any] = {
    "hidden_states": f"B {BEHIND}+N C",
    "encoder_hidden_states": f"B {TEXT}+{BEHIND}//4 {TEXT_WIDTH}",
    "timestep": lambda asked: asked.times(1e-3),
    "img_shapes": lambda asked: [[(1, *REFERENCE), asked.grid]] * asked.batch,
    "img_mask": qwen21_mask,
    "kv_cache": qwen21_cache,
    "kv_cache_mode": lambda _: "cached",
}


def glm_cache(asked: Asked) -> Any:
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    caches = GlmImageKVCache(len(asked.model.transformer_blocks))
    for layer in caches.caches:
        layer.store(*(x[:1] for x in cached(asked, BEHIND)))
    caches.set_mode("read")
    return caches


GLM: dict[str, Any] = JOINT | {
    "out_channels": CHANNELS,
    "text_embed_dim": TEXT_WIDTH,
    "time_embed_dim": 16,
    "condition_dim": 4,
    "prior_vq_quantizer_codebook_size": 16,
}
GLM_INPUTS: dict[str, Any] = PICTURE_OF_PATCHES | {
    "prior_token_id": lambda asked: torch.arange(math.prod(asked.grid)).remainder(16).expand(asked.batch, -1),
    "prior_token_drop": lambda asked: torch.zeros(asked.batch, math.prod(asked.grid), dtype=torch.bool),
    "target_size": "B 2",
    "crop_coords": "B 2",
}
JOY: dict[str, Any] = {
    "in_channels": CHANNELS,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "text_dim": TEXT_WIDTH,
    "num_layers": 2,
    "rope_dim_list": list(ROPE_AXES),
}
JOY_INPUTS: dict[str, Any] = {
    "hidden_states": "B 2 C F 2*H 2*W",
    "timestep": Asked.times,
    "encoder_hidden_states": f"B {TEXT} {TEXT_WIDTH}",
}
JOY_PLUS_INPUTS: dict[str, Any] = JOY_INPUTS | {
    "hidden_states": f"B N+{BEHIND} C 1 2 2",
    "encoder_hidden_states_mask": lambda asked: asked.text_mask().float(),
    "shape_list": lambda asked: [[asked.grid, (1, *REFERENCE)]] * asked.batch,
}


def joy_pixels(inputs: Inputs, grid: Grid, token: Grid) -> torch.Tensor:
    """Of the item that comes last, and that the model puts first."""
    return patch((2, 3, 4))({"hidden_states": inputs["hidden_states"][:, 1]}, grid, token)


TABLE: list[Row] = [
    (
        "qwen_image_21",
        "QwenImage21Transformer2DModel",
        QWEN21,
        QWEN21_INPUTS,
        last_packed,
        {"grid": (1, 14, 18), "text": (TEXT + BEHIND,) * 2, "absent": TEXT + BEHIND, "batched": False, "fits": even},
    ),
    ("glm_image", "GlmImageTransformer2DModel", GLM, GLM_INPUTS, of_picture(2), TEXT_AND_IMAGE),
    (
        "glm_image_edit",
        "GlmImageTransformer2DModel",
        GLM,
        GLM_INPUTS | {"kv_caches": glm_cache},
        of_picture(2),
        REFERENCES_BEHIND | {"absent": BEHIND},
    ),
    (
        "joy_image_edit",
        "JoyImageEditTransformer3DModel",
        JOY,
        JOY_INPUTS,
        joy_pixels,
        IMAGE | {"text": (TOKENS + TEXT,) * 2},
    ),
    (
        "joy_image_edit_plus",
        "JoyImageEditPlusTransformer3DModel",
        JOY,
        JOY_PLUS_INPUTS,
        packed,
        REFERENCES_BEHIND,
    ),
]
EDITING_CASES = cases(TABLE)
