"""The other video models."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AllegroTransformer3DModel,
    CosmosTransformer3DModel,
    Kandinsky5Transformer3DModel,
    MochiTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

from tests.video.cases.base import (
    CHANNELS,
    HEAD_DIM,
    HEADS,
    ROPE_AXES,
    TEXT,
    TEXT_PADDED,
    TEXT_WIDTH,
    WIDTH,
    Asked,
    ModelCase,
    patch,
    tiny,
)

INPUTS: dict[str, Any] = {
    "hidden_states": "B C F 2*H 2*W",
    "encoder_hidden_states": f"B {TEXT} {TEXT_WIDTH}",
    "timestep": Asked.times,
}


def allegro_rope(asked: Asked) -> Any:
    frames, *size = asked.grid
    head_dim = asked.model.config.attention_head_dim
    *frequencies, t, h, w = get_3d_rotary_pos_embed_allegro(head_dim, ((0, 0), size), size, frames)
    positions = torch.cartesian_prod(t.round().long(), h.round().long(), w.round().long()).T
    return tuple(frequencies), tuple(positions[:, None])


COSMOS = tiny(
    CosmosTransformer3DModel,
    in_channels=CHANNELS,
    out_channels=CHANNELS,
    num_attention_heads=HEADS,
    attention_head_dim=HEAD_DIM,
    num_layers=2,
    mlp_ratio=2,
    text_embed_dim=TEXT_WIDTH,
    adaln_lora_dim=8,
    max_size=(16, 32, 32),
    # Resizing the padding mask would need torchvision.
    concat_padding_mask=False,
)
COSMOS_INPUTS = INPUTS | {"fps": 24}
COSMOS2_INPUTS = COSMOS_INPUTS | {"timestep": lambda asked: asked.times_per_frame(1e-3)[:, None, :, None, None]}

VIDEO_CASES = [
    ModelCase(
        "mochi",
        tiny(
            MochiTransformer3DModel,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            num_layers=2,
            pooled_projection_dim=24,
            in_channels=CHANNELS,
            text_embed_dim=TEXT_WIDTH,
            time_embed_dim=16,
        ),
        INPUTS | {"encoder_attention_mask": lambda asked: asked.text_mask().bool()},
        patch(),
        text=(TEXT, TEXT_PADDED),
        per_item=True,
    ),
    ModelCase(
        "allegro",
        tiny(
            AllegroTransformer3DModel,
            num_attention_heads=HEADS,
            # A multiple of three axes by pairs: not a power of two, like the model's own 96.
            attention_head_dim=24,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=2,
            cross_attention_dim=HEADS * 24,
            caption_channels=TEXT_WIDTH,
        ),
        INPUTS
        | {
            "timestep": lambda asked: asked.times().long(),
            "encoder_attention_mask": Asked.text_mask,
            "image_rotary_emb": allegro_rope,
        },
        patch(),
    ),
    ModelCase(
        "kandinsky5",
        tiny(
            Kandinsky5Transformer3DModel,
            in_visual_dim=CHANNELS,
            out_visual_dim=CHANNELS,
            in_text_dim=TEXT_WIDTH,
            in_text_dim2=8,
            time_dim=16,
            model_dim=WIDTH,
            ff_dim=96,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=ROPE_AXES,
        ),
        INPUTS
        | {
            "hidden_states": "B F 2*H 2*W C",
            "pooled_projections": "B 8",
            "visual_rope_pos": lambda asked: [torch.arange(size) for size in asked.grid],
            "text_rope_pos": lambda _: torch.arange(TEXT),
        },
        patch(axes=(1, 2, 3)),
    ),
    ModelCase("cosmos", COSMOS, COSMOS_INPUTS, patch()),
    ModelCase("cosmos2", COSMOS, COSMOS2_INPUTS, patch()),
]
