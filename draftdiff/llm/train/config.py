"""The architecture of a new draft: its target's family, tokenizer and vocabulary, at a given number of parameters."""

from __future__ import annotations

import copy
from math import gcd
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from draftdiff.errors import UserError

TOLERANCE = 0.1  # of the parameters asked for
STEP = 64  # of widths, or the size of a head if that is less
MLP_STRETCH = (0.75, 1.25)  # of the target's ratio between the widths of its MLP and its layers

# Names of the width of an MLP, which GPT-2 and its kin leave at four times all, and of the widths of experts.
_MLP = ("intermediate_size", "n_inner")
_EXPERTS = ("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp")


def draft_config(target_config: PretrainedConfig, params: float = 50e6) -> PretrainedConfig:
    """A config for a draft of about `params` parameters, embeddings included, for `AutoModelForCausalLM.from_config`.

    Width comes before depth, because a draft's layers run one after the other while the target waits: the fewest
    layers that need no more than a quarter of the target's width (or four heads, if that is more), then half or all of
    it if the target's own depth is not enough. Heads keep the target's size where it divides the width, and their
    share of key heads; the width of the MLP takes up what is left to the number asked for. The draft is in float32,
    because bfloat16 would round away the small steps of its training, and not quantized, whatever the target is.

    Raises ValueError if the family's config has no widths to set, or if no draft comes within a tenth of `params`.
    """
    target = copy.deepcopy(target_config.get_text_config())
    if getattr(target, "num_key_value_heads", 0) is None:  # some families cannot be built before it is said
        target.num_key_value_heads = target.num_attention_heads
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if not isinstance(getattr(target, name, None), int):
            raise UserError(f"target_config must have a whole number {name}; {target.model_type} has none")
    if not any(hasattr(target, name) for name in _MLP):
        raise UserError(f"target_config must have {' or '.join(_MLP)}; {target.model_type} has neither")
    for name in (*_MLP, *_EXPERTS):
        if not isinstance(getattr(target, name, None), int | None):
            raise UserError(f"target_config must have one {name} for all layers; {target.model_type} has one for each")
    least, most = count_parameters(_scaled(target, 1, _step(target), MLP_STRETCH[0])), count_parameters(target)
    if (1 - TOLERANCE) * params <= most and least <= (1 + TOLERANCE) * params:
        narrow = max(target.hidden_size // 4, min(target.hidden_size, 4 * _head_size(target)))
        for cap in (narrow, max(narrow, target.hidden_size // 2), target.hidden_size):
            for layers in range(1, target.num_hidden_layers + 1):
                if count_parameters(_scaled(target, layers, cap, MLP_STRETCH[1])) < (1 - TOLERANCE) * params:
                    continue
                config = _fitted(target, layers, cap, params)
                if abs(count_parameters(config) - params) <= TOLERANCE * params:
                    return config
    raise UserError(
        f"params must be from {least:,}, a draft of width {_step(target)} with the target's vocabulary of "
        f"{target.vocab_size:,}, to {most:,}, the target itself, got {params:,.0f}"
    )


def count_parameters(config: PretrainedConfig) -> int:
    """Parameters of a config's causal language model, tied weights counted once; allocates nothing."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters())


def _fitted(target: PretrainedConfig, layers: int, cap: int, params: float) -> PretrainedConfig:
    # The widest that is not too large, then its MLP stretched to the number asked for.
    step = _step(target)
    low, high = 1, max(1, cap // step)
    while low < high:
        middle = (low + high + 1) // 2
        if count_parameters(_scaled(target, layers, middle * step)) <= params:
            low = middle
        else:
            high = middle - 1
    counts = [count_parameters(_scaled(target, layers, low * step, stretch)) for stretch in MLP_STRETCH]
    share = (params - counts[0]) / max(1, counts[1] - counts[0])
    stretch = MLP_STRETCH[0] + min(max(share, 0.0), 1.0) * (MLP_STRETCH[1] - MLP_STRETCH[0])
    return _scaled(target, layers, low * step, stretch)


def _scaled(target: PretrainedConfig, layers: int, width: int, mlp_stretch: float = 1.0) -> PretrainedConfig:
    fields: dict[str, Any] = target.to_dict()
    mlps = {name: getattr(target, name) or 4 * target.hidden_size for name in _MLP if hasattr(target, name)}
    mlps |= {name: getattr(target, name) for name in _EXPERTS if getattr(target, name, None)}
    head = gcd(_head_size(target), width)
    heads = width // head
    grouped = getattr(target, "num_key_value_heads", None) or target.num_attention_heads
    key_heads = max(1, heads * grouped // target.num_attention_heads)
    fields |= {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "dtype": "float32",
        "_name_or_path": "",
    }
    for name, mlp_width in mlps.items():
        fields[name] = max(8, 8 * round(mlp_stretch * mlp_width * width / target.hidden_size / 8))
    fields.pop("quantization_config", None)
    if "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = max(k for k in range(1, key_heads + 1) if heads % k == 0)
    if fields.get("head_dim") is not None:
        fields["head_dim"] = head
    if fields.get("layer_types"):
        kinds = fields["layer_types"]
        last = "full_attention" if "full_attention" in kinds else kinds[-1]  # short drafts see everything, too
        fields["layer_types"] = [*kinds[-layers:][:-1], last]
    return type(target).from_dict(fields)


def _head_size(target: PretrainedConfig) -> int:
    return getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads


def _step(target: PretrainedConfig) -> int:
    if "short_factor" in (getattr(target, "rope_parameters", None) or {}):  # longrope: one for each pair of a head
        return _head_size(target)
    return min(STEP, _head_size(target))
