"""Models of releases after the oldest supported diffusers: those that are there."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import torch

from tests.video.cases.base import (
    CHANNELS,
    HEAD_DIM,
    HEADS,
    ROPE_AXES,
    TEXT,
    TEXT_WIDTH,
    WIDTH,
    Asked,
    Grid,
    Inputs,
    ModelCase,
    packed,
    patch,
    tiny,
)

AUDIO, KEYFRAME = 6, (1, 6, 10)  # less than a tile has
KEYFRAME_ROWS = KEYFRAME[1] * KEYFRAME[2]
REFERENCES = ((1, 8, 9), (3, 6, 9))  # an image and a video, with its sound before it
REFERENCE = (8, 9)  # more than a tile has
VIDEO: dict[str, Any] = {
    "hidden_states": "B C F 2*H 2*W",
    "encoder_hidden_states": f"B {TEXT} {TEXT_WIDTH}",
    "timestep": Asked.times,
}
WAN_LIKE: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
JOINT: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": CHANNELS,
    "num_layers": 2,
}


def raster(grid: Grid, *first: float) -> torch.Tensor:
    """Positions of a grid's tokens, those of `first` and the frame in front of row and column."""
    t, y, x = (torch.arange(size).float() for size in grid)
    places = torch.cartesian_prod(t, y, x)
    places[:, 0] += first[0] if first else 0.0
    return places


def h3_parts(asked: Asked, references: bool) -> list[tuple[str, torch.Tensor]]:
    """Kind and positions of the parts of a sequence, in order."""

    def sound(start: float) -> torch.Tensor:
        return torch.stack([start + 0.5 * torch.arange(AUDIO), torch.zeros(AUDIO), torch.zeros(AUDIO)], dim=1)

    text = torch.zeros(TEXT, 3)
    text[:, 0] = torch.arange(TEXT)
    if not references:
        before = [("video", raster(KEYFRAME, 10.0))]
    else:
        image, video = REFERENCES
        before = [("video", raster(image, 10.0)), ("audio", sound(11.0)), ("video", raster(video, 11.0))]
    return [("text", text), *before, ("audio", sound(20.0)), ("video", raster(asked.grid, 20.0))]


def h3_inputs(references: bool = False) -> dict[str, Any]:
    extra = sum(math.prod(grid) for grid in REFERENCES) if references else KEYFRAME_ROWS

    def positions(asked: Asked) -> torch.Tensor:
        return torch.cat([rows for _, rows in h3_parts(asked, references)])

    def kinds(asked: Asked) -> torch.Tensor:
        tags = {"video": 0, "text": 1, "audio": 2}
        return torch.cat([torch.full((len(rows),), tags[kind]) for kind, rows in h3_parts(asked, references)])

    def rows_of(tag: int) -> Any:
        return lambda asked: (kinds(asked) == tag).nonzero()[:, 0]

    return {
        "hidden_states": f"B {extra}+N 4*C",
        "audio_hidden_states": f"B {AUDIO * (1 + references)} 3",
        "encoder_hidden_states": f"B {TEXT} {TEXT_WIDTH}",
        "timestep": lambda _: torch.tensor([0.7, 1.0, 0.5]),  # each row of the sequence says which
        "timestep_indices": lambda asked: (torch.arange(len(kinds(asked))) < TEXT + 4).long(),
        "token_tags": kinds,
        "position_ids": positions,
        "video_indices": rows_of(0),
        "audio_indices": rows_of(2),
        "text_indices": rows_of(1),
    }


def h3_pixels(inputs: Inputs, grid: Grid, token: Grid) -> torch.Tensor:
    frame, row, column = token
    return inputs["hidden_states"][:, (frame * grid[1] + row) * grid[2] + column - math.prod(grid)]


def flux2_ids(asked: Asked, references: bool) -> torch.Tensor:
    rows = raster((1, *asked.grid[1:]))
    if references:
        rows = torch.cat([rows, raster((1, *REFERENCE), 10.0)])
    return torch.cat([rows, torch.zeros(len(rows), 1)], dim=1).expand(asked.batch, -1, -1)


def flux2(name: str, references: bool) -> tuple[str, str, dict[str, Any], Any, Any, dict[str, Any]]:
    extra = REFERENCE[0] * REFERENCE[1] if references else 0
    config = JOINT | {"num_single_layers": 2, "joint_attention_dim": TEXT_WIDTH, "timestep_guidance_channels": 16}
    inputs = {
        "hidden_states": f"B N+{extra} C",
        "encoder_hidden_states": f"B {TEXT} {TEXT_WIDTH}",
        "timestep": lambda asked: asked.times(1e-3),
        "img_ids": lambda asked: flux2_ids(asked, references),
        "txt_ids": lambda asked: torch.cat([torch.zeros(TEXT, 3), torch.arange(TEXT)[:, None]], dim=1).expand(
            asked.batch, -1, -1
        ),
        "guidance": lambda asked: torch.full((asked.batch,), 3.5),
    }
    more = {"grid": (1, 15, 18), "layers": 4, "text": (TEXT + extra,) * 2}
    return name, "Flux2Transformer2DModel", config | {"axes_dims_rope": (8, 8, 8, 8)}, inputs, packed, more


KREA_INPUTS: dict[str, Any] = {
    "hidden_states": "B N C",
    "encoder_hidden_states": f"B {TEXT} 2 {TEXT_WIDTH}",
    "timestep": lambda asked: asked.times(1e-3),
    "position_ids": lambda asked: torch.cat([torch.zeros(TEXT, 3), raster(asked.grid)]),
    "encoder_attention_mask": lambda asked: asked.text_mask().bool(),
}
KREA: dict[str, Any] = {
    "in_channels": CHANNELS,
    "num_layers": 2,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "timestep_embed_dim": 16,
    "text_hidden_dim": TEXT_WIDTH,
    "num_text_layers": 2,
    "text_num_attention_heads": 2,
    "text_num_key_value_heads": 2,
    "text_intermediate_size": 16,
    "num_layerwise_text_blocks": 1,
    "num_refiner_text_blocks": 1,
    "axes_dims_rope": ROPE_AXES,
}
H3: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "hidden_size": 32,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "ffn_dim": 32,
    "in_channels": CHANNELS,
    "audio_in_channels": 3,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 16,
    "time_embed_hidden_dim": 16,
    "time_embed_dim": 16,
    "rope_freq_dim": 4,
}
KANDINSKY6: dict[str, Any] = {
    "in_visual_dim": CHANNELS,
    "out_visual_dim": CHANNELS,
    "in_text_dim": TEXT_WIDTH,
    "in_text_dim2": 8,
    "time_dim": 16,
    "model_dim": WIDTH,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": ROPE_AXES,
    "visual_cond": False,
}
KANDINSKY6_INPUTS: dict[str, Any] = {
    "hidden_states": "B F 2*H 2*W C",
    "encoder_hidden_states": f"B {TEXT} {TEXT_WIDTH}",
    "pooled_projections": "B 8",
    "timestep": Asked.times,
    "visual_rope_pos": lambda asked: tuple(torch.arange(size) for size in asked.grid),
}
MOTIF: dict[str, Any] = JOINT | {
    "out_channels": CHANNELS,
    "num_single_layers": 2,
    "text_embed_dim": TEXT_WIDTH,
    "rope_axes_dim": ROPE_AXES,
}
HUNYUAN_IMAGE: dict[str, Any] = JOINT | {
    "out_channels": CHANNELS,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": TEXT_WIDTH,
    "rope_axes_dim": (16, 16),
}
SD3: dict[str, Any] = JOINT | {
    "sample_size": 32,
    "out_channels": CHANNELS,
    "joint_attention_dim": TEXT_WIDTH,
    "caption_projection_dim": WIDTH,
    "pooled_projection_dim": 8,
    "pos_embed_max_size": 32,
    "qk_norm": "rms_norm",
}
PICTURE = {"hidden_states": "B C H W", "encoder_hidden_states": f"B {TEXT} {TEXT_WIDTH}", "timestep": Asked.times}
MASKED = {"encoder_attention_mask": Asked.text_mask}


def of_picture(size: int) -> Any:
    """Pixels of a token of an image."""

    def pixels(inputs: Inputs, _: Grid, token: Grid) -> torch.Tensor:
        view = inputs["hidden_states"]
        for axis, place in ((2, token[1]), (3, token[2])):
            view = view.narrow(axis, size * place, size)
        return view

    return pixels


IMAGE = {"grid": (1, 15, 18)}
FLUX_LIKE: dict[str, Any] = JOINT | {
    "num_single_layers": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": list(ROPE_AXES),
}
FLUX_LIKE_INPUTS: dict[str, Any] = {
    "hidden_states": "B N C",
    "encoder_hidden_states": f"B {TEXT} {TEXT_WIDTH}",
    "timestep": lambda asked: asked.times(1e-3),
    "img_ids": lambda asked: raster(asked.grid, 1.0),
    "txt_ids": lambda _: torch.cat([torch.zeros(TEXT, 1), torch.arange(TEXT)[:, None].repeat(1, 2)], dim=1),
}
FLUX_LIKE_MORE: dict[str, Any] = IMAGE | {"layers": 4, "text": (TEXT, TEXT)}
COGVIEW: dict[str, Any] = JOINT | {
    "out_channels": CHANNELS,
    "text_embed_dim": TEXT_WIDTH,
    "time_embed_dim": 16,
    "condition_dim": 4,
    "pos_embed_max_size": 32,
    "sample_size": 32,
}
SIZES: dict[str, Any] = dict.fromkeys(("original_size", "target_size", "crop_coords"), "B 2")
PICTURE_OF_PATCHES = PICTURE | {"hidden_states": "B C 2*H 2*W"}
TABLE = [
    (
        "minimax_h3",
        "MiniMaxH3Transformer3DModel",
        H3,
        h3_inputs(),
        h3_pixels,
        {"text": (TEXT + KEYFRAME_ROWS + AUDIO,) * 2},
    ),
    (
        "minimax_h3_references",
        "MiniMaxH3Transformer3DModel",
        H3,
        h3_inputs(references=True),
        h3_pixels,
        {"text": (TEXT + sum(math.prod(grid) for grid in REFERENCES) + 2 * AUDIO,) * 2},
    ),
    ("kandinsky6", "Kandinsky6Transformer3DModel", KANDINSKY6, KANDINSKY6_INPUTS, patch((1, 2, 3)), {}),
    (
        "helios",
        "HeliosTransformer3DModel",
        WAN_LIKE | {"rope_dim": ROPE_AXES},
        VIDEO,
        patch(),
        {},
    ),
    (
        "anyflow",
        "AnyFlowTransformer3DModel",
        WAN_LIKE | {"rope_max_seq_len": 64},
        VIDEO
        | {
            "hidden_states": "B F C 2*H 2*W",
            "timestep": Asked.times_per_frame,
            "r_timestep": lambda asked: asked.times_per_frame(0.5),
        },
        patch((1, 3, 4)),
        {},
    ),
    (
        "motif",
        "MotifVideoTransformer3DModel",
        MOTIF,
        VIDEO | MASKED,
        patch(),
        {"layers": 4, "text": (TEXT, TEXT)},
    ),
    flux2("flux2", False),
    flux2("flux2_references", True),
    ("krea2", "Krea2Transformer2DModel", KREA, KREA_INPUTS, packed, IMAGE | {"text": (TEXT, TEXT)}),
    (
        "hunyuan_image",
        "HunyuanImageTransformer2DModel",
        HUNYUAN_IMAGE,
        PICTURE | MASKED,
        of_picture(1),
        IMAGE | {"layers": 4, "text": (TEXT, TEXT)},
    ),
    (
        "longcat_image",
        "LongCatImageTransformer2DModel",
        FLUX_LIKE | {"pooled_projection_dim": 8},
        FLUX_LIKE_INPUTS,
        packed,
        FLUX_LIKE_MORE,
    ),
    (
        "ovis_image",
        "OvisImageTransformer2DModel",
        FLUX_LIKE | {"out_channels": CHANNELS},
        FLUX_LIKE_INPUTS,
        packed,
        FLUX_LIKE_MORE,
    ),
    ("bria", "BriaTransformer2DModel", FLUX_LIKE, FLUX_LIKE_INPUTS, packed, FLUX_LIKE_MORE),
    (
        "cogview4",
        "CogView4Transformer2DModel",
        COGVIEW | {"rope_axes_dim": (64, 64)},
        PICTURE_OF_PATCHES | SIZES,
        of_picture(2),
        IMAGE | {"text": (TEXT, TEXT)},
    ),
    (
        "cogview3_plus",
        "CogView3PlusTransformer2DModel",
        COGVIEW,
        PICTURE_OF_PATCHES | SIZES,
        of_picture(2),
        IMAGE | {"text": (TEXT, TEXT)},
    ),
    (
        "sd3",
        "SD3Transformer2DModel",
        SD3,
        PICTURE | {"hidden_states": "B C 2*H 2*W", "pooled_projections": "B 8"},
        of_picture(2),
        IMAGE | {"text": (TEXT, TEXT)},
    ),
]
NEWER_CASES = [
    ModelCase(name, tiny(getattr(diffusers, model), **config), inputs, pixels, **more)
    for name, model, config, inputs, pixels, more in TABLE
    if hasattr(diffusers, model)
]
