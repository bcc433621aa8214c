"""Models of sequences that hold text, picture and more in one stream: Z-Image, Cosmos 3, HiDream, Ideogram 4."""

from __future__ import annotations

import math
from typing import Any

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
    last_packed,
)
from tests.video.cases.newer import IMAGE, JOINT, of_picture, raster
from tests.video.cases.rows import SIZED, TEXT_AND_IMAGE, TOKENS, Row, cases, noise


# Z-Image pads picture and text to multiples of 32 tokens.
def padded(tokens: int) -> int:
    return math.ceil(tokens / 32) * 32


Z_IMAGE = SIZED | {
    "in_channels": CHANNELS,
    "n_kv_heads": HEADS,
    "cap_feat_dim": TEXT_WIDTH,
    "axes_dims": ROPE_AXES,
    "axes_lens": (128, 64, 64),
}
Z_IMAGE_INPUTS: dict[str, Any] = {
    "x": lambda asked: list(noise(asked.batch, CHANNELS, 1, 2 * asked.grid[1], 2 * asked.grid[2])),
    "t": lambda asked: asked.times(1e-3),
    "cap_feats": lambda asked: [noise(length, TEXT_WIDTH) for length in ((TEXT, 40) * asked.batch)[: asked.batch]],
}


def z_image_pixels(inputs: Inputs, grid: Grid, token: Grid) -> torch.Tensor:
    view = inputs["x"][0]
    for axis, place in ((2, token[1]), (3, token[2])):
        view = view.narrow(axis, 2 * place, 2)
    return view


UNDERSTANDING, SOUND = 9, 6
COSMOS3: dict[str, Any] = {
    "head_dim": HEAD_DIM,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "latent_channel": CHANNELS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "patch_latent_dim": 4 * CHANNELS,
    "vocab_size": 32,
    "sound_gen": True,
    "sound_dim": 3,
    "rope_axes_dim": (6, 5, 5),
}


def cosmos3_positions(asked: Asked) -> torch.Tensor:
    count = torch.arange(UNDERSTANDING).float()[:, None].expand(-1, 3)
    sound = torch.arange(SOUND).float()[:, None].expand(-1, 3)
    return torch.cat([count, raster(asked.grid, float(UNDERSTANDING)), sound]).T


def cosmos3_rows(asked: Asked) -> torch.Tensor:
    return UNDERSTANDING + torch.arange(math.prod(asked.grid))


def cosmos3_sound(asked: Asked) -> torch.Tensor:
    return UNDERSTANDING + math.prod(asked.grid) + torch.arange(SOUND)


COSMOS3_INPUTS: dict[str, Any] = {
    "input_ids": lambda _: torch.arange(UNDERSTANDING),
    "text_indexes": lambda _: torch.arange(UNDERSTANDING),
    "position_ids": cosmos3_positions,
    "und_len": UNDERSTANDING,
    "sequence_length": lambda asked: UNDERSTANDING + math.prod(asked.grid) + SOUND,
    "vision_tokens": ["B C F 2*H 2*W"],
    "vision_token_shapes": lambda asked: [asked.grid],
    "vision_sequence_indexes": cosmos3_rows,
    "vision_mse_loss_indexes": cosmos3_rows,
    "vision_timesteps": lambda asked: torch.full((math.prod(asked.grid),), 700.0),
    "vision_noisy_frame_indexes": lambda asked: [torch.arange(asked.grid[0])],
    "sound_tokens": lambda _: [noise(3, SOUND)],
    "sound_token_shapes": [(SOUND, 1, 1)],
    "sound_sequence_indexes": cosmos3_sound,
    "sound_mse_loss_indexes": cosmos3_sound,
    "sound_timesteps": lambda _: torch.full((SOUND,), 700.0),
    "sound_noisy_frame_indexes": lambda _: [torch.arange(SOUND)],
}


def cosmos3_pixels(inputs: Inputs, grid: Grid, token: Grid) -> torch.Tensor:
    view = inputs["vision_tokens"][0]
    for axis, size, place in zip((2, 3, 4), (1, 2, 2), token):
        view = view.narrow(axis, size * place, size)
    return view


HIDREAM: dict[str, Any] = JOINT | {
    "patch_size": 2,
    "num_layers": 1,
    "num_single_layers": 1,
    "caption_channels": [TEXT_WIDTH, TEXT_WIDTH],
    "text_emb_dim": 8,
    "num_routed_experts": 2,
    "num_activated_experts": 1,
    "axes_dims_rope": ROPE_AXES,
    "max_resolution": (36, 36),
    "llama_layers": [0, 1],
    "force_inference_output": True,
}
HIDREAM_INPUTS: dict[str, Any] = {
    "hidden_states": "B C 2*H 2*W",
    "timesteps": Asked.times,
    "encoder_hidden_states_t5": f"B {TEXT} {TEXT_WIDTH}",
    "encoder_hidden_states_llama3": f"2 B 3 {TEXT_WIDTH}",
    "pooled_embeds": "B 8",
}
# A picture that is not square is filled up to the largest; T5, and Llama's last and own layer.
HIDREAM_TEXT = 18 * 18 - TOKENS + TEXT + 3 + 3
IDEOGRAM: dict[str, Any] = {
    "in_channels": CHANNELS,
    "num_layers": 2,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "adaln_dim": 16,
    "llm_features_dim": TEXT_WIDTH,
    "mrope_section": (6, 5, 5),
}


def ideogram(asked: Asked) -> dict[str, torch.Tensor]:
    """Of a sequence with padding, text and image: where its tokens stand, what they belong to and what they are. Its
    pipeline has the image 65,536 further on, where an angle in fp32 is known to 0.004 and single tokens change places.
    """
    text = asked.text_mask().flip(1).bool()
    image = torch.ones(asked.batch, math.prod(asked.grid), dtype=torch.long)
    positions = torch.cat([torch.arange(TEXT).float()[:, None].expand(-1, 3), raster(asked.grid) + 64])
    return {
        "position_ids": positions.long().expand(asked.batch, -1, -1),
        "segment_ids": torch.cat([torch.where(text, 1, -1), image], dim=1),
        "indicator": torch.cat([torch.where(text, 3, 0), 2 * image], dim=1),
    }


IDEOGRAM_INPUTS: dict[str, Any] = {
    "hidden_states": f"B {TEXT}+N C",
    "timestep": lambda asked: asked.times(1e-3),
    "encoder_hidden_states": f"B {TEXT}+N {TEXT_WIDTH}",
} | {name: lambda asked, name=name: ideogram(asked)[name] for name in ("position_ids", "segment_ids", "indicator")}


def image_alone(build: Any) -> Any:
    """Returns what its pipeline reads. What it makes of padding is of padding."""

    def built() -> Any:
        model = build()
        model.register_forward_hook(lambda _model, _args, output: (output[0][:, TEXT:],))
        return model

    return built


TABLE: list[Row] = [
    (
        "z_image",
        "ZImageTransformer2DModel",
        Z_IMAGE,
        Z_IMAGE_INPUTS,
        z_image_pixels,
        IMAGE
        | {
            "layers": 3,
            "text": (padded(TOKENS) - TOKENS + padded(40),) * 2,
            "apart": {r"noise_refiner.*": padded(TOKENS) - TOKENS},
        },
    ),
    (
        "cosmos3",
        "Cosmos3OmniTransformer",
        COSMOS3,
        COSMOS3_INPUTS,
        cosmos3_pixels,
        {"text": (UNDERSTANDING + SOUND,) * 2, "absent": UNDERSTANDING, "batched": False},
    ),
    (
        "hidream",
        "HiDreamImageTransformer2DModel",
        HIDREAM,
        HIDREAM_INPUTS,
        of_picture(2),
        IMAGE | {"text": (HIDREAM_TEXT,) * 2},
    ),
    ("ideogram4", "Ideogram4Transformer2DModel", IDEOGRAM, IDEOGRAM_INPUTS, last_packed, TEXT_AND_IMAGE),
]
PACKED_CASES = cases(TABLE, {"ideogram4": image_alone})
