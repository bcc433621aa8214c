"""Llama decoder layers over hidden states, as a `TreeDecoder` feeds them: the attention of Hydra++ and EAGLE-3.

The first layer may read an embedded token beside each state, as EAGLE-3's does (arXiv 2503.01840). Names are Llama's,
so that published weights keep theirs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; `width` is that of its input."""

    def __init__(self, config: LlamaConfig, index: int, width: int) -> None:
        super().__init__()
        self.index, self.head_dim, bias = index, config.head_dim, config.attention_bias
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        self.grouped = heads != key_heads
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, key_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, key_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=bias)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, causal: bool, cache: Any
    ) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *rotation)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A decoder layer. reads_tokens: it attends over an embedding beside each state, both with norms of their own.
    norm_first: what is added to the attention's output is the state after its norm."""

    def __init__(
        self, config: LlamaConfig, index: int, *, reads_tokens: bool = False, norm_first: bool = False
    ) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.norm_first = norm_first
        self.hidden_norm = LlamaRMSNorm(width, eps) if reads_tokens else None
        self.input_layernorm, self.post_attention_layernorm = LlamaRMSNorm(width, eps), LlamaRMSNorm(width, eps)
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
    """Layers one after the other, with the rotary positions that they share."""

    def __init__(self, config: LlamaConfig, *, reads_tokens: bool = False, norm_first: bool = False) -> None:
        first = {"reads_tokens": reads_tokens, "norm_first": norm_first}
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
