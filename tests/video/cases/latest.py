"""Models whose sequence holds more than a grid and text, or whose calls have another form: those that are there."""

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
    last_packed,
    packed,
    patch,
    takes,
    tiny,
)
from tests.video.cases.newer import (
    FLUX_LIKE,
    FLUX_LIKE_INPUTS,
    FLUX_LIKE_MORE,
    IMAGE,
    JOINT,
    PICTURE_OF_PATCHES,
    flux2,
    of_picture,
    raster,
)

REFERENCE = (8, 9)  # more than a tile has
BEHIND = REFERENCE[0] * REFERENCE[1]
GRID: Grid = (1, 15, 18)
TOKENS = math.prod(GRID)
SIZED: dict[str, Any] = {"dim": WIDTH, "n_heads": HEADS, "n_refiner_layers": 1, "n_layers": 2}
TEXT_AND_IMAGE: dict[str, Any] = IMAGE | {"text": (TEXT, TEXT)}


def noise(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cached(asked: Asked, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of so many tokens that have no queries."""
    keys, values = noise(2, asked.batch, tokens, HEADS, HEAD_DIM)
    return keys, values


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


FLUX3: dict[str, Any] = JOINT | {
    "cond_in_channels": 3,
    "num_layers": 1,
    "num_single_layers": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "timestep_channels": 16,
    "axes_dims_rope": (8, 8, 8, 8),
}


def four_ids(height: int, width: int, image: float = 0.0) -> torch.Tensor:
    rows = raster((1, height, width), image)
    return torch.cat([rows, torch.zeros(len(rows), 1)], dim=1)


FLUX3_INPUTS: dict[str, Any] = {
    "hidden_states": "B N C",
    "encoder_hidden_states": f"B {TEXT} {TEXT_WIDTH}",
    "timestep": lambda asked: asked.times(1e-3),
    "img_ids": lambda asked: four_ids(*asked.grid[1:]),
    "txt_ids": lambda _: torch.cat([torch.zeros(TEXT, 3), torch.arange(TEXT)[:, None]], dim=1),
}
FLUX3_REFERENCES = FLUX3_INPUTS | {
    "image_cond_hidden_states": f"B {BEHIND} 3",
    "image_cond_ids": lambda _: four_ids(*REFERENCE, image=10.0),
}


def flux2_cache(asked: Asked) -> Any:
    from diffusers.models.transformers.transformer_flux2 import Flux2KVCache

    model = asked.model
    cache = Flux2KVCache(len(model.transformer_blocks), len(model.single_transformer_blocks))
    cache.num_ref_tokens = BEHIND
    for layer in (*cache.double_block_caches, *cache.single_block_caches):
        layer.store(*cached(asked, BEHIND))
    return cache


def klein(build: Any) -> Any:
    """With the processors of FLUX.2 klein-KV."""

    def with_cache() -> Any:
        from diffusers.models.transformers.transformer_flux2 import (
            Flux2KVAttnProcessor,
            Flux2KVParallelSelfAttnProcessor,
        )

        model = build()
        for block in model.transformer_blocks:
            block.attn.set_processor(Flux2KVAttnProcessor())
        for block in model.single_transformer_blocks:
            block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
        return model

    return with_cache


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
CHROMA = FLUX_LIKE | {
    "approximator_num_channels": 64,
    "approximator_hidden_dim": 32,
    "approximator_layers": 1,
}


def joint_flags(asked: Asked) -> torch.Tensor:
    """[batch, TEXT and image]: the text of odd batch items is padded."""
    return torch.cat(
        [asked.text_mask().bool(), torch.ones(asked.batch, math.prod(asked.grid), dtype=torch.bool)], dim=1
    )


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
    """Of a sequence with padding, text and image: where its tokens stand, what they belong to and what they are."""
    text = asked.text_mask().flip(1).bool()
    image = torch.ones(asked.batch, math.prod(asked.grid), dtype=torch.long)
    positions = torch.cat([torch.arange(TEXT).float()[:, None].expand(-1, 3), raster(asked.grid) + 65_536])
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


FIBO = FLUX_LIKE | {"text_encoder_dim": TEXT_WIDTH}
FIBO_INPUTS = FLUX_LIKE_INPUTS | {
    "hidden_states": f"B N+{BEHIND} C",
    "text_encoder_layers": [f"B {TEXT} {TEXT_WIDTH}"] * 4,
    "img_ids": lambda asked: torch.cat([raster(asked.grid), raster((1, *REFERENCE), 1.0)]),
    "joint_attention_kwargs": lambda asked: {
        "attention_mask": torch.cat([joint_flags(asked), torch.ones(asked.batch, BEHIND, dtype=torch.bool)], dim=1)[
            :, None, None
        ]
    },
}
FIBO2 = SIZED | {
    "in_channels": CHANNELS,
    "cap_feat_dim": TEXT_WIDTH,
    "injection_layer_ids": (1,),
    "perceiver_num_layers": 1,
    "min_num_gist_tokens": 12,
    "max_num_gist_tokens": 24,
    "gist_step": 4,
    "gist_min_text_len": 2,
    "gist_max_text_len": 18,
    "axes_dims": ROPE_AXES,
    "axes_lens": (64, 32, 32),
}
FIBO2_INPUTS: dict[str, Any] = {
    "hidden_states": "B C 2*H 2*W",
    "timestep": lambda asked: asked.times(1e-3),
    "encoder_hidden_states": f"B 2 {TEXT} {TEXT_WIDTH}",
    "context_latents": [f"B C 2*{REFERENCE[0]} 2*{REFERENCE[1]}"],
}
GIST = 20
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


REFERENCES_BEHIND: dict[str, Any] = IMAGE | {"text": (TEXT + BEHIND,) * 2}
KLEIN_NAME, KLEIN_MODEL, KLEIN, KLEIN_INPUTS, _, KLEIN_MORE = flux2("flux2_klein_kv", False)
TABLE: list[tuple[str, str, dict[str, Any], dict[str, Any], Any, dict[str, Any]]] = [
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
        "qwen_image_21",
        "QwenImage21Transformer2DModel",
        QWEN21,
        QWEN21_INPUTS,
        last_packed,
        {"grid": (1, 14, 18), "text": (TEXT + BEHIND,) * 2, "absent": TEXT + BEHIND, "batched": False, "fits": even},
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
        "flux3",
        "Flux3Transformer2DModel",
        FLUX3,
        FLUX3_INPUTS,
        packed,
        TEXT_AND_IMAGE | {"layers": 3, "apart": {r"mode_blocks.*": 0}},
    ),
    (
        "flux3_references",
        "Flux3Transformer2DModel",
        FLUX3,
        FLUX3_REFERENCES,
        packed,
        REFERENCES_BEHIND | {"layers": 3, "apart": {r"mode_blocks.*": 0}},
    ),
    (
        KLEIN_NAME,
        KLEIN_MODEL,
        KLEIN,
        KLEIN_INPUTS | {"kv_cache": flux2_cache, "kv_cache_mode": lambda _: "cached"},
        packed,
        KLEIN_MORE | {"text": (TEXT + BEHIND,) * 2, "absent": BEHIND, "batched": False},
    ),
    (
        "chroma",
        "ChromaTransformer2DModel",
        CHROMA,
        FLUX_LIKE_INPUTS | {"attention_mask": joint_flags},
        packed,
        FLUX_LIKE_MORE,
    ),
    (
        "chroma_weighed",
        "ChromaTransformer2DModel",
        CHROMA,
        FLUX_LIKE_INPUTS | {"attention_mask": lambda asked: joint_flags(asked).float()},
        packed,
        FLUX_LIKE_MORE,
    ),
    (
        "hidream",
        "HiDreamImageTransformer2DModel",
        HIDREAM,
        HIDREAM_INPUTS,
        of_picture(2),
        IMAGE | {"text": (HIDREAM_TEXT,) * 2},
    ),
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
    ("ideogram4", "Ideogram4Transformer2DModel", IDEOGRAM, IDEOGRAM_INPUTS, last_packed, TEXT_AND_IMAGE),
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
    (
        "bria_fibo",
        "BriaFiboTransformer2DModel",
        FIBO,
        FIBO_INPUTS,
        packed,
        FLUX_LIKE_MORE | {"text": (TEXT + BEHIND,) * 2},
    ),
    (
        "bria_fibo2",
        "BriaFibo2Transformer2DModel",
        FIBO2,
        FIBO2_INPUTS,
        of_picture(2),
        IMAGE | {"layers": 3, "text": (GIST + BEHIND,) * 2, "apart": {r"noise_refiner.*": BEHIND}},
    ),
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


def lively_aura(build: Any) -> Any:
    """Its attention reaches the output through the feed-forward layer alone, which a tiny model has too small."""

    def with_more() -> Any:
        model = build()
        for block in (*model.joint_transformer_blocks, *model.single_transformer_blocks):
            block.attn.to_out[0].weight.data *= 8
            block.ff.out_projection.weight.data *= 8
        return model

    return with_more


def image_alone(build: Any) -> Any:
    """Returns what its pipeline reads. What it makes of padding is of padding."""

    def built() -> Any:
        model = build()
        model.register_forward_hook(lambda _model, _args, output: (output[0][:, TEXT:],))
        return model

    return built


def _build(name: str, model: str, config: dict[str, Any]) -> Any:
    build = tiny(getattr(diffusers, model), **config)
    change = {KLEIN_NAME: klein, "auraflow": lively_aura, "ideogram4": image_alone}.get(name)
    return change(build) if change else build


LATEST_CASES = [
    ModelCase(name, _build(name, model, config), inputs, pixels, **more)
    for name, model, config, inputs, pixels, more in TABLE
    if hasattr(diffusers, model) and takes(getattr(diffusers, model), inputs)
]
