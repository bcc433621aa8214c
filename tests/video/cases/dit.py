"""Diffusion transformers over a picture, or a video, and text that are of no family here."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.video.cases.base import CHANNELS, HEAD_DIM, HEADS, ROPE_AXES, TEXT, TEXT_WIDTH, WIDTH, Asked, packed, patch
from tests.video.cases.newer import IMAGE, JOINT, PICTURE_OF_PATCHES, of_picture
from tests.video.cases.rows import TEXT_AND_IMAGE, Row, cases

NUCLEUS: dict[str, Any] = JOINT | {
    "out_channels": CHANNELS,
    "patch_size": 1,
    "num_key_value_heads": 1,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": ROPE_AXES,
    "mlp_ratio": 6.0,
    "moe_enabled": False,
}
NUCLEUS_INPUTS: dict[str, Any] = {
    "hidden_states": "B N C",
    "img_shapes": lambda asked: [asked.grid] * asked.batch,
    "encoder_hidden_states": f"B {TEXT} {TEXT_WIDTH}",
    "encoder_hidden_states_mask": lambda asked: asked.text_mask().bool(),
    "timestep": lambda asked: asked.times(1e-3),
}
PRX: dict[str, Any] = {
    "in_channels": CHANNELS,
    "context_in_dim": TEXT_WIDTH,
    "hidden_size": WIDTH,
    "num_heads": HEADS,
    "depth": 2,
    "axes_dim": [16, 16],
}
LUMINA: dict[str, Any] = {
    "in_channels": CHANNELS,
    "hidden_size": WIDTH,
    "num_layers": 2,
    "num_attention_heads": HEADS,
    "multiple_of": 16,
    "norm_eps": 1e-5,
    "sample_size": 32,
}
LUMINA2 = LUMINA | {
    "num_refiner_layers": 1,
    "num_kv_heads": 1,
    "axes_dim_rope": ROPE_AXES,
    "axes_lens": (64, 32, 32),
    "cap_feat_dim": TEXT_WIDTH,
}
LUMINA2_TEXT = 8
AURA: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": CHANNELS,
    "num_mmdit_layers": 1,
    "num_single_dit_layers": 1,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "joint_attention_dim": TEXT_WIDTH,
    "caption_projection_dim": WIDTH,
    "pos_embed_max_size": 1024,
}
REGISTERS = 8
ERNIE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_layers": 2,
    "ffn_hidden_size": 32,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_in_dim": TEXT_WIDTH,
    "rope_axes_dim": ROPE_AXES,
}
ERNIE_INPUTS: dict[str, Any] = {
    "hidden_states": "B C H W",
    "timestep": Asked.times,
    "text_bth": f"B {TEXT} {TEXT_WIDTH}",
    "text_lens": lambda asked: asked.text_mask().sum(1),
}
CONSIS: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "time_embed_dim": 16,
    "text_embed_dim": TEXT_WIDTH,
    "num_layers": 2,
    "sample_width": 18,
    "sample_height": 12,
    "sample_frames": 17,
    "max_text_seq_length": TEXT,
}
PIXART: dict[str, Any] = JOINT | {
    "out_channels": CHANNELS,
    "sample_size": 32,
    "cross_attention_dim": WIDTH,
    "caption_channels": TEXT_WIDTH,
    "norm_num_groups": 2,
    "use_additional_conditions": False,
}
HUNYUAN_DIT: dict[str, Any] = JOINT | {
    "hidden_size": WIDTH,
    "patch_size": 2,
    "sample_size": 36,
    "mlp_ratio": 1.0,
    "learn_sigma": False,
    "cross_attention_dim": TEXT_WIDTH,
    "cross_attention_dim_t5": TEXT_WIDTH,
    "pooled_projection_dim": 8,
    "text_len": TEXT,
    "text_len_t5": TEXT,
}


def hunyuan_dit_rotary(asked: Asked) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(torch.arange(math.prod(asked.grid)).float(), 0.1 ** torch.arange(HEAD_DIM // 2))
    angles = angles.repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


HUNYUAN_DIT_INPUTS: dict[str, Any] = {
    "hidden_states": "B C 2*H 2*W",
    "timestep": Asked.times,
    "encoder_hidden_states": f"B {TEXT} {TEXT_WIDTH}",
    "text_embedding_mask": Asked.text_mask,
    "encoder_hidden_states_t5": f"B {TEXT} {TEXT_WIDTH}",
    "text_embedding_mask_t5": Asked.text_mask,
    "image_meta_size": "B 6",
    "style": lambda asked: torch.zeros(asked.batch, dtype=torch.long),
    "image_rotary_emb": hunyuan_dit_rotary,
}
LUMINA_NEXT = LUMINA | {"num_kv_heads": 1, "learn_sigma": False, "qk_norm": True, "cross_attention_dim": TEXT_WIDTH}


def lumina_rotary(_: Asked) -> torch.Tensor:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return get_2d_rotary_pos_embed_lumina(HEAD_DIM, 384, 384)


def lively_aura(build: Any) -> Any:
    """Its attention reaches the output through the feed-forward layer alone, which a tiny model has too small."""

    def with_more() -> Any:
        model = build()
        for block in (*model.joint_transformer_blocks, *model.single_transformer_blocks):
            block.attn.to_out[0].weight.data *= 8
            block.ff.out_projection.weight.data *= 8
        return model

    return with_more


TABLE: list[Row] = [
    (
        "nucleus_image",
        "NucleusMoEImageTransformer2DModel",
        NUCLEUS,
        NUCLEUS_INPUTS,
        packed,
        TEXT_AND_IMAGE | {"absent": TEXT},
    ),
    (
        "prx",
        "PRXTransformer2DModel",
        PRX,
        PICTURE_OF_PATCHES | {"timestep": lambda asked: asked.times(1e-3), "attention_mask": Asked.text_mask},
        of_picture(2),
        TEXT_AND_IMAGE | {"absent": TEXT},
    ),
    (
        "lumina2",
        "Lumina2Transformer2DModel",
        LUMINA2,
        PICTURE_OF_PATCHES
        | {"encoder_attention_mask": lambda asked: (torch.arange(TEXT) < LUMINA2_TEXT).long().expand(asked.batch, -1)},
        of_picture(2),
        IMAGE | {"layers": 3, "text": (LUMINA2_TEXT,) * 2, "apart": {r"noise_refiner.*": 0}},
    ),
    (
        "auraflow",
        "AuraFlowTransformer2DModel",
        AURA,
        PICTURE_OF_PATCHES | {"timestep": lambda asked: asked.times(1e-3)},
        of_picture(2),
        IMAGE | {"text": (REGISTERS + TEXT,) * 2},
    ),
    ("ernie_image", "ErnieImageTransformer2DModel", ERNIE, ERNIE_INPUTS, of_picture(1), TEXT_AND_IMAGE),
    (
        "consisid",
        "ConsisIDTransformer3DModel",
        CONSIS,
        {
            "hidden_states": "B F C 2*H 2*W",
            "encoder_hidden_states": f"B {TEXT} {TEXT_WIDTH}",
            "timestep": Asked.times,
        },
        patch((1, 3, 4)),
        {"text": (TEXT, TEXT)},
    ),
    (
        "pixart",
        "PixArtTransformer2DModel",
        PIXART,
        PICTURE_OF_PATCHES | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        of_picture(2),
        IMAGE,
    ),
    ("hunyuan_dit", "HunyuanDiT2DModel", HUNYUAN_DIT, HUNYUAN_DIT_INPUTS, of_picture(2), IMAGE),
    (
        "lumina_next",
        "LuminaNextDiT2DModel",
        LUMINA_NEXT,
        PICTURE_OF_PATCHES
        | {
            "timestep": lambda asked: asked.times(1e-3),
            "encoder_mask": Asked.text_mask,
            "image_rotary_emb": lumina_rotary,
            "cross_attention_kwargs": {},
        },
        of_picture(2),
        IMAGE,
    ),
]
DIT_CASES = cases(TABLE, {"auraflow": lively_aura})
