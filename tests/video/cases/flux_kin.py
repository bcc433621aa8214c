"""FLUX.2 klein with its cache, FLUX.3, Chroma and Bria Fibo."""

from __future__ import annotations

from typing import Any

import torch

from tests.video.cases.base import CHANNELS, ROPE_AXES, TEXT, TEXT_WIDTH, Asked, packed
from tests.video.cases.newer import FLUX_LIKE, FLUX_LIKE_INPUTS, FLUX_LIKE_MORE, IMAGE, JOINT, flux2, of_picture, raster
from tests.video.cases.rows import (
    BEHIND,
    REFERENCE,
    REFERENCES_BEHIND,
    SIZED,
    TEXT_AND_IMAGE,
    Row,
    cached,
    cases,
    joint_flags,
)

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


CHROMA = FLUX_LIKE | {
    "approximator_num_channels": 64,
    "approximator_hidden_dim": 32,
    "approximator_layers": 1,
}
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
KLEIN_NAME, KLEIN_MODEL, KLEIN, KLEIN_INPUTS, _, KLEIN_MORE = flux2("flux2_klein_kv", False)
TABLE: list[Row] = [
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
]
FLUX_KIN_CASES = cases(TABLE, {KLEIN_NAME: klein})
