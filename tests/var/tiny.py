"""Tiny VAR models with lively random weights, shared by the tests."""

from __future__ import annotations

import torch

from draftdiff.pipelines.var import VARPipeline
from draftdiff.var.scheduler_var import VARScheduler
from draftdiff.var.transformer_var import VARTransformer2DModel
from draftdiff.var.vq_model import VQModel

PATCH_NUMS = (1, 2, 3, 4, 6, 8)


def enliven(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random weights under which different inputs give clearly different outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("log_scale"):
                parameter.uniform_(0.5, 5.0, generator=generator)  # some above the clamp
            elif parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5, generator=generator)
            elif "norm" not in name:
                parameter.normal_(std=0.1, generator=generator)
    return model.eval()


def transformer(seed: int = 0, **changes) -> VARTransformer2DModel:
    settings = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "vocab_size": 32,
        "num_classes": 5,
        "patch_nums": PATCH_NUMS,
    }
    return enliven(VARTransformer2DModel(**settings | changes), seed)


def vq_model(seed: int = 1, **changes) -> VQModel:
    settings = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "latent_channels": 4,
        "num_vq_embeddings": 32,
        "patch_nums": PATCH_NUMS,
        "norm_num_groups": 4,
    }
    return enliven(VQModel(**settings | changes), seed)


def var_pipeline(patch_nums=PATCH_NUMS, seed: int = 0, **changes) -> VARPipeline:
    model = transformer(seed, patch_nums=patch_nums, **changes)
    pipe = VARPipeline(model, vq_model(patch_nums=patch_nums), VARScheduler(patch_nums, top_k=20, top_p=0.95))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def to_original(model) -> dict[str, torch.Tensor]:
    """The parameters of a model as an original checkpoint has them."""
    names = model.original_names({})
    tensors, thirds = {}, {}
    for key, tensor in model.state_dict().items():
        name, tensor = names(key), tensor.clone()
        prefix, _, last = name.rpartition("to_")
        if last == "qkv.bias":
            tensors[f"{prefix}q_bias"], tensors[f"{prefix}zero_k_bias"], tensors[f"{prefix}v_bias"] = tensor.chunk(3)
        elif last == "kv.bias":
            tensors[f"{prefix}zero_k_bias"], tensors[f"{prefix}v_bias"] = tensor.chunk(2)
        elif last[:2] in ("q.", "k.", "v."):
            thirds.setdefault(f"{prefix}qkv.{last[2:]}", {})[last[0]] = tensor
        else:
            tensors[name] = tensor
    for name, parts in thirds.items():
        whole = torch.cat([parts[letter] for letter in "qkv"])
        tensors[name] = whole[..., None, None] if whole.ndim == 2 else whole
    return tensors
