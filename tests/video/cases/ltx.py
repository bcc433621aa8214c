"""LTX-Video and LTX-2."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel, LTXVideoTransformer3DModel

from tests.video.cases.base import (
    CHANNELS,
    HEAD_DIM,
    HEADS,
    TEXT,
    TEXT_WIDTH,
    WIDTH,
    Asked,
    ModelCase,
    packed,
    tiny,
)

LTX = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "cross_attention_dim": WIDTH,
    "num_layers": 2,
    "caption_channels": TEXT_WIDTH,
}
LTX2 = tiny(
    LTX2VideoTransformer3DModel,
    **LTX,
    audio_in_channels=CHANNELS,
    audio_out_channels=CHANNELS,
    audio_num_attention_heads=HEADS,
    audio_attention_head_dim=16,
    audio_cross_attention_dim=HEADS * 16,
)
INPUTS: dict[str, Any] = {
    "hidden_states": "B N C",
    "encoder_hidden_states": f"B {TEXT} {TEXT_WIDTH}",
    "timestep": Asked.times,
    "encoder_attention_mask": Asked.text_mask,
    "num_frames": lambda asked: asked.grid[0],
    "height": lambda asked: asked.grid[1],
    "width": lambda asked: asked.grid[2],
}
INPUTS2 = INPUTS | {
    "audio_hidden_states": "B 7 C",
    "audio_encoder_hidden_states": f"B {TEXT} {TEXT_WIDTH}",
    "audio_encoder_attention_mask": Asked.text_mask,
    "fps": 24.0,
    "audio_num_frames": 7,
}
APPENDED = 4


def keyframe_coords(asked: Asked) -> torch.Tensor:
    coords = asked.model.rope.prepare_video_coords(asked.batch, *asked.grid, torch.device("cpu"))
    return torch.cat([coords, coords[:, :, :APPENDED]], dim=2)


LTX_CASES = [
    ModelCase(
        "ltx",
        tiny(LTXVideoTransformer3DModel, **LTX),
        INPUTS | {"rope_interpolation_scale": (8 / 25, 32, 32)},
        packed,
    ),
    ModelCase("ltx2", LTX2, INPUTS2, packed),
    ModelCase(
        "ltx2_keyframes",
        LTX2,
        INPUTS2 | {"hidden_states": f"B N+{APPENDED} C", "video_coords": keyframe_coords},
        packed,
        text=(APPENDED,) * 2,
    ),
]
