"""Wan and its kin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    ChronoEditTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from torch import nn

from tests.video.cases.base import CHANNELS, HEAD_DIM, HEADS, TEXT, TEXT_WIDTH, WIDTH, Asked, ModelCase, patch, tiny

# Wan's image-to-video cross-attention takes what exceeds 512 tokens for the image.
WAN_TEXT = 512
WAN = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
IMAGE = WAN | {"image_dim": 8, "added_kv_proj_dim": WIDTH}


def tiny_wan(layers: int, heads: int = 2, channels: int = 4) -> Callable[[], nn.Module]:
    """A Wan transformer of a chosen depth, for tests that need one of their own."""
    return tiny(
        WanTransformer3DModel,
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=HEAD_DIM,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=layers,
    )


def per_token(asked: Asked) -> torch.Tensor:
    """Timesteps of all tokens, 0 in the first frame: it is given."""
    frames, height, width = asked.grid
    times = asked.times()[:, None].repeat(1, frames * height * width)
    times[:, : height * width] = 0
    return times


TEXT_TO_VIDEO: dict[str, Any] = {
    "hidden_states": "B C F 2*H 2*W",
    "timestep": lambda asked: asked.times().long(),
    "encoder_hidden_states": f"B {TEXT} {TEXT_WIDTH}",
}
IMAGE_TO_VIDEO = TEXT_TO_VIDEO | {
    "encoder_hidden_states": f"B {WAN_TEXT} {TEXT_WIDTH}",
    "encoder_hidden_states_image": "B 5 8",
}
# The face encoder halves the frames twice; one reference frame has no pose and no face.
ANIMATE = IMAGE_TO_VIDEO | {
    "pose_hidden_states": f"B {CHANNELS} F-1 2*H 2*W",
    "face_pixel_values": "B 3 4*(F-1) 16 16",
}
FORCING = TEXT_TO_VIDEO | {
    "timestep": lambda asked: asked.times_per_frame().long(),
    "enable_diffusion_forcing": True,
}

WAN_CASES = [
    ModelCase("wan_t2v", tiny(WanTransformer3DModel, **WAN), TEXT_TO_VIDEO, patch()),
    ModelCase("wan_i2v", tiny(WanTransformer3DModel, **IMAGE | {"in_channels": 2 * CHANNELS}), IMAGE_TO_VIDEO, patch()),
    ModelCase("wan_ti2v", tiny(WanTransformer3DModel, **WAN), TEXT_TO_VIDEO | {"timestep": per_token}, patch()),
    ModelCase(
        "wan_vace",
        tiny(WanVACETransformer3DModel, **WAN, vace_layers=[0, 1], vace_in_channels=6),
        TEXT_TO_VIDEO | {"control_hidden_states": "B 6 F 2*H 2*W"},
        patch(),
        layers=4,
    ),
    ModelCase(
        "wan_animate",
        tiny(
            WanAnimateTransformer3DModel,
            **IMAGE | {"in_channels": 2 * CHANNELS + 4, "latent_channels": CHANNELS},
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=8,
            face_encoder_hidden_dim=8,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=1,
        ),
        ANIMATE,
        patch(),
    ),
    ModelCase("chronoedit", tiny(ChronoEditTransformer3DModel, **WAN), TEXT_TO_VIDEO, patch()),
    ModelCase("skyreels_v2", tiny(SkyReelsV2Transformer3DModel, **WAN), TEXT_TO_VIDEO, patch()),
    ModelCase("skyreels_v2_forcing", tiny(SkyReelsV2Transformer3DModel, **WAN), FORCING, patch()),
]
