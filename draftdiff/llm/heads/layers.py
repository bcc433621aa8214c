"""Llama decoder layers over hidden states, as a `TreeDecoder` feeds them: the attention of Hydra++ and EAGLE-3.

The first layer may read an embedded token beside each state, as EAGLE-3's does (arXiv 2503.01840). Names are Llama's,
so that published weights keep theirs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

# Fields of a stored LlamaConfig that say how a layer computes.
LAYER_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "mlp_bias",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
)


def layer_fields(target: PreTrainedModel) -> dict[str, Any]:
    """Fields of a LlamaConfig for one layer of the sizes and rotary positions of a target's last one."""
    text = target.config.get_text_config()
    heads = text.num_attention_heads
    rope, kinds = getattr(text, "rope_parameters", None) or {}, getattr(text, "layer_types", None)
    if kinds and kinds[-1] in rope:  # some turn each kind of layer in its own way
        rope = rope[kinds[-1]]
    fields = {
        "hidden_size": text.hidden_size,
        "intermediate_size": getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "rms_norm_eps": getattr(text, "rms_norm_eps", None) or 1e-6,
        "max_position_embeddings": getattr(text, "max_position_embeddings", None) or 2048,
        "num_hidden_layers": 1,
    }
    return fields | ({"rope_parameters": dict(rope)} if rope else {})


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; `width`: of its input.  output_bias: None for the config's."""

    def __init__(self, config: LlamaConfig, index: int, width: int, output_bias: bool | None = None) -> None:
        super().__init__()
        self.index, self.head_dim, bias = index, config.head_dim, config.attention_bias
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        self.grouped = heads != key_heads
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, key_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, key_heads * self.head_dim, bias=bias)
        output_bias = bias if output_bias is None else output_bias
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=output_bias)

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values [rows, heads, tokens, head_dim]."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return (*apply_rotary_pos_emb(q, k, *rotation), v)

    def join(self, out: Tensor) -> Tensor:
        """States of what the queries have found, [rows, heads, tokens, head_dim]."""
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, causal: bool, cache: Any
    ) -> Tensor:
        q, k, v = self.project(x, rotation)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        return self.join(
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped)
        )


class Layer(nn.Module):
    """A decoder layer. reads_tokens: it attends over an embedding beside each state, both with norms of their own.
    norm_first: what is added to the attention's output is the state after its norm.  input_norm: whether it has one
    before the attention."""

    def __init__(
        self,
        config: LlamaConfig,
        index: int,
        *,
        reads_tokens: bool = False,
        norm_first: bool = False,
        input_norm: bool = True,
    ) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.norm_first = norm_first
        self.hidden_norm = LlamaRMSNorm(width, eps) if reads_tokens else None
        self.input_layernorm = LlamaRMSNorm(width, eps) if input_norm else nn.Identity()
        self.post_attention_layernorm = LlamaRMSNorm(width, eps)
        self.self_attn = Attention(config, index, 2 * width if reads_tokens else width)
        self.mlp = LlamaMLP(config)

    def forward(self, x: Tensor, embedded: Tensor | None, *seen: Any) -> Tensor:
        if self.hidden_norm is None:
            read = self.input_layernorm(x)
        else:
            normed = self.hidden_norm(x)
            read = torch.cat([self.input_layernorm(embedded), normed], dim=-1)
            x = normed if self.norm_first else x
        x = x + self.self_attn(read, *seen)
        return x + self.mlp(self.post_attention_layernorm(x))


class Stack(nn.ModuleList):
    """Layers one after the other, with the rotary positions that they share. first: what the first `Layer` takes."""

    def __init__(self, config: LlamaConfig, **first: bool) -> None:
        super().__init__(
            Layer(config, index, **first if index == 0 else {}) for index in range(config.num_hidden_layers)
        )
        self._rotary = [LlamaRotaryEmbedding(config)]  # not a module of this one: weights are all that it has

    def forward(
        self, x: Tensor, embedded: Tensor | None, mask: Tensor | None, positions: Tensor, cache: Any = None
    ) -> Tensor:
        """States [rows, tokens, width] of new tokens. embedded: as x, for a first layer that reads tokens.  mask: bool
        [rows, 1, tokens, all], or of padding [rows, all], None for a plain chain.  positions: int64 [rows, tokens]."""
        rotary = self._rotary[0] = self._rotary[0].to(x.device)
        held = 0 if cache is None else cache.get_seq_length()
        causal = mask is None and held == 0  # a whole prompt, whose mask would be large
        seen = (rotary(x, positions), None if causal else _visible(mask, x.shape[1], held, x.device), causal, cache)
        for layer in self:
            x = layer(x, embedded, *seen)
        return x


def _visible(mask: Tensor | None, new: int, held: int, device: torch.device) -> Tensor | None:
    """Which tokens new ones see, bool [rows or 1, 1, new, held + new]; None where all of them."""
    if mask is not None and mask.ndim == 4:
        return mask
    if mask is None and new == 1:
        return None
    causal = torch.ones(new, held + new, dtype=torch.bool, device=device).tril(held)
    if mask is None:
        return causal[None, None]
    # A token sees itself whatever the mask says: what a padding token is must at least be a number.
    itself = torch.eye(new, held + new, dtype=torch.bool, device=device).roll(held, dims=1)
    return (causal & mask[:, None, None, :].bool()) | itself
