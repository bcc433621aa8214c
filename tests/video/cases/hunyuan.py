"""HunyuanVideo and its kin."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
)

from tests.video.cases.base import (
    CHANNELS,
    HEAD_DIM,
    HEADS,
    ROPE_AXES,
    TEXT,
    TEXT_WIDTH,
    Asked,
    Grid,
    Inputs,
    ModelCase,
    patch,
    tiny,
)

HUNYUAN = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "text_embed_dim": TEXT_WIDTH,
    "pooled_projection_dim": 8,
    "rope_axes_dim": ROPE_AXES,
}
INPUTS: dict[str, Any] = {
    "hidden_states": "B C F 2*H 2*W",
    "timestep": Asked.times,
    "encoder_hidden_states": f"B {TEXT} {TEXT_WIDTH}",
    "encoder_attention_mask": Asked.text_mask,
    "pooled_projections": "B 8",
    "guidance": lambda asked: torch.full((asked.batch,), 6000.0),
}

CLEAN_FRAMES = 2
FRAMEPACK_IMAGE = 3
# Two frames of history at half the resolution and four at a quarter, of a 6 x 9 grid: 3 x 5 and 2 x 3 tokens.
FRAMEPACK_COARSE = 15 + 6
FRAMEPACK_INPUTS = INPUTS | {
    "hidden_states": f"B C F-{CLEAN_FRAMES} 2*H 2*W",
    "image_embeds": f"B {FRAMEPACK_IMAGE} 8",
    "indices_latents": lambda asked: torch.arange(8, 8 + asked.grid[0] - CLEAN_FRAMES),
    "latents_clean": f"B C {CLEAN_FRAMES} 2*H 2*W",
    "indices_latents_clean": lambda _: torch.tensor([0, 7]),
    "latents_history_2x": "B C 2 2*H 2*W",
    "indices_latents_history_2x": lambda _: torch.arange(5, 7),
    "latents_history_4x": "B C 4 2*H 2*W",
    "indices_latents_history_4x": lambda _: torch.arange(1, 5),
}


def framepack_pixels(inputs: Inputs, grid: Grid, token: Grid) -> torch.Tensor:
    frame, row, column = token
    if frame < CLEAN_FRAMES:
        return patch(name="latents_clean")(inputs, grid, token)
    return patch()(inputs, grid, (frame - CLEAN_FRAMES, row, column))


BYT5, IMAGE = 5, 3
HUNYUAN15 = tiny(
    HunyuanVideo15Transformer3DModel,
    in_channels=CHANNELS,
    out_channels=CHANNELS,
    num_attention_heads=HEADS,
    attention_head_dim=HEAD_DIM,
    num_layers=2,
    num_refiner_layers=1,
    text_embed_dim=TEXT_WIDTH,
    text_embed_2_dim=8,
    image_embed_dim=8,
    rope_axes_dim=ROPE_AXES,
)
INPUTS15: dict[str, Any] = {
    "hidden_states": "B C F H W",
    "timestep": Asked.times,
    "encoder_hidden_states": f"B {TEXT} {TEXT_WIDTH}",
    "encoder_attention_mask": Asked.text_mask,
    "encoder_hidden_states_2": f"B {BYT5} 8",
    "encoder_attention_mask_2": lambda asked: torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])[: asked.batch],
    "image_embeds": lambda asked: torch.zeros(asked.batch, IMAGE, 8),
}
# The grid, for one token a latent, and the tokens of the text outside it.
PLACE15: dict[str, Any] = {"pixels": patch(sizes=(1, 1, 1)), "text": (TEXT + BYT5 + IMAGE,) * 2}


def hunyuan(name: str, **config: Any) -> ModelCase:
    build = tiny(HunyuanVideoTransformer3DModel, **HUNYUAN | config)
    return ModelCase(name, build, INPUTS, patch(), layers=4, text=(TEXT, TEXT))


HUNYUAN_CASES = [
    hunyuan("hunyuan_video"),
    hunyuan("hunyuan_video_i2v_token_replace", image_condition_type="token_replace"),
    hunyuan("hunyuan_video_i2v_latent_concat", in_channels=2 * CHANNELS + 1, image_condition_type="latent_concat"),
    ModelCase(
        "framepack",
        tiny(
            HunyuanVideoFramepackTransformer3DModel,
            **HUNYUAN,
            has_image_proj=True,
            image_proj_dim=8,
            has_clean_x_embedder=True,
        ),
        FRAMEPACK_INPUTS,
        framepack_pixels,
        layers=4,
        text=(FRAMEPACK_COARSE + FRAMEPACK_IMAGE + TEXT,) * 2,
    ),
    ModelCase("hunyuan_video_15", HUNYUAN15, INPUTS15, **PLACE15),
    ModelCase("hunyuan_video_15_i2v", HUNYUAN15, INPUTS15 | {"image_embeds": f"B {IMAGE} 8"}, **PLACE15),
]
