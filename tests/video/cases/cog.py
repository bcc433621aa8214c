"""CogVideoX and EasyAnimate."""

from __future__ import annotations

from typing import Any

from diffusers import CogVideoXTransformer3DModel, EasyAnimateTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from tests.video.cases.base import CHANNELS, HEAD_DIM, HEADS, TEXT, TEXT_WIDTH, Asked, ModelCase, patch, tiny

COGVIDEOX = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "time_embed_dim": 16,
    "text_embed_dim": TEXT_WIDTH,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": TEXT,
}
INPUTS: dict[str, Any] = {
    "hidden_states": "B F C 2*H 2*W",
    "encoder_hidden_states": f"B {TEXT} {TEXT_WIDTH}",
    "timestep": lambda asked: asked.times().long(),
}


def rope(asked: Asked) -> Any:
    frames, height, width = asked.grid
    return get_3d_rotary_pos_embed(HEAD_DIM, None, (height, width), frames, grid_type="slice", max_size=(height, width))


COG_CASES = [
    ModelCase(
        "cogvideox_2b",
        tiny(CogVideoXTransformer3DModel, **COGVIDEOX),
        INPUTS,
        patch(axes=(1, 3, 4)),
        text=(TEXT, TEXT),
    ),
    ModelCase(
        "cogvideox_15",
        tiny(CogVideoXTransformer3DModel, **COGVIDEOX, patch_size_t=2, use_rotary_positional_embeddings=True),
        INPUTS | {"hidden_states": "B 2*F C 2*H 2*W", "image_rotary_emb": rope},
        patch(axes=(1, 3, 4), sizes=(2, 2, 2)),
        text=(TEXT, TEXT),
    ),
    ModelCase(
        "easyanimate",
        tiny(
            EasyAnimateTransformer3DModel,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            patch_size=2,
            num_layers=2,
            mmdit_layers=1,
            time_embed_dim=16,
            text_embed_dim=TEXT_WIDTH,
        ),
        INPUTS | {"hidden_states": "B C F 2*H 2*W", "timestep": Asked.times},
        patch(),
        text=(TEXT, TEXT),
    ),
]
