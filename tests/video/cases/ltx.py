"""LTX-Video and LTX-2."""

from __future__ import annotations

import math
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
    last_packed,
    packed,
    takes,
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
CONDITION, REFERENCE = (2, 6, 9), (3, 6, 9)  # frames that a video is conditioned on, and a reference: more than a tile


def condition_coords(asked: Asked) -> torch.Tensor:
    """Of frames to come, which stand before the video, and of the video."""
    later = raster(CONDITION, 3.0)
    return torch.cat([later, raster(asked.grid)]).T.expand(asked.batch, -1, -1)


def raster(grid: tuple[int, int, int], start: float = 0.0) -> torch.Tensor:
    places = torch.cartesian_prod(*(torch.arange(size).float() for size in grid))
    places[:, 0] += start
    return places


def reference_coords(asked: Asked) -> torch.Tensor:
    """Of the video and, behind it, a reference (IC-LoRA)."""
    rope, device = asked.model.rope, torch.device("cpu")
    parts = [rope.prepare_video_coords(asked.batch, *grid, device) for grid in (asked.grid, REFERENCE)]
    return torch.cat(parts, dim=2)


def strengths(asked: Asked) -> torch.Tensor:
    """Of a video, keyframes and two references (IC-LoRA), as its pipeline makes the mask: one reference is weighed, and
    of the other some tokens are left out."""
    video, prefix = math.prod(asked.grid), math.prod(asked.grid) + APPENDED
    groups = torch.full((math.prod(REFERENCE),), 1 - 1e-4), torch.full((APPENDED,), 1 - 3e-4)
    groups[0][::3] = 0
    mask = torch.zeros(prefix + sum(map(len, groups)), prefix + sum(map(len, groups)))
    mask[:prefix, :prefix] = 1
    start = prefix
    for strength in groups:
        own = slice(start, start + len(strength))
        mask[:video, own], mask[own, :video], mask[own, own] = strength, strength[:, None], 1
        start += len(strength)
    return mask.expand(asked.batch, -1, -1)


def strength_coords(asked: Asked) -> torch.Tensor:
    coords = reference_coords(asked)
    video, few = math.prod(asked.grid), coords[:, :, :APPENDED]
    return torch.cat([coords[:, :, :video], few, coords[:, :, video:], few], dim=2)


def keyframe_coords(asked: Asked) -> torch.Tensor:
    coords = asked.model.rope.prepare_video_coords(asked.batch, *asked.grid, torch.device("cpu"))
    return torch.cat([coords, coords[:, :, :APPENDED]], dim=2)


_CASES = [
    ModelCase(
        "ltx",
        tiny(LTXVideoTransformer3DModel, **LTX),
        INPUTS | {"rope_interpolation_scale": (8 / 25, 32, 32)},
        packed,
    ),
    ModelCase(
        "ltx_condition",
        tiny(LTXVideoTransformer3DModel, **LTX),
        INPUTS
        | {
            "hidden_states": f"B {math.prod(CONDITION)}+N C",
            "video_coords": condition_coords,
            "num_frames": None,
            "height": None,
            "width": None,
        },
        last_packed,
        text=(math.prod(CONDITION),) * 2,
    ),
    ModelCase("ltx2", LTX2, INPUTS2, packed),
    ModelCase(
        "ltx2_references",
        LTX2,
        INPUTS2
        | {
            "hidden_states": f"B N+{math.prod(REFERENCE)} C",
            "video_coords": reference_coords,
            "video_self_attention_mask": lambda asked: torch.ones(
                asked.batch, *[math.prod(asked.grid) + math.prod(REFERENCE)] * 2
            ),
        },
        packed,
        text=(math.prod(REFERENCE),) * 2,
    ),
    ModelCase(
        "ltx2_keyframes",
        LTX2,
        INPUTS2 | {"hidden_states": f"B N+{APPENDED} C", "video_coords": keyframe_coords},
        packed,
        text=(APPENDED,) * 2,
    ),
    ModelCase(
        "ltx2_strengths",
        LTX2,
        INPUTS2
        | {
            "hidden_states": f"B N+{2 * APPENDED + math.prod(REFERENCE)} C",
            "video_coords": strength_coords,
            "video_self_attention_mask": strengths,
        },
        packed,
        text=(2 * APPENDED + math.prod(REFERENCE),) * 2,
    ),
]
LTX_CASES = [
    case
    for case in _CASES
    if takes(LTX2VideoTransformer3DModel if "ltx2" in case.name else LTXVideoTransformer3DModel, case.spec)
]
