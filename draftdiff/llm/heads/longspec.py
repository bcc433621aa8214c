"""The draft layer of LongSpec (arXiv 2502.17421): a window of attention of its own, then the target's last keys.

A token attends to itself and the `window` tokens before it, then to what the target's last layer holds of the text that
it has read; embedding and output layer are the target's. As in the original q, k and v have biases, and no norm stands
before the output layer. The cross-attention has no keys and values of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from draftdiff.llm.checks import require
from draftdiff.llm.heads import files
from draftdiff.llm.heads.layers import LAYER_FIELDS, Attention, layer_fields
from draftdiff.llm.heads.target import TargetParts

# From rotated queries, keys and values of new tokens [rows, heads, tokens, head_dim] to what they see, as the queries.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Cross = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LongSpecConfig:
    """layer: fields of the layer's LlamaConfig.  window: tokens before a token that it attends to."""

    layer: dict[str, Any]
    window: int = 512

    def __post_init__(self) -> None:
        require(
            isinstance(self.window, int) and self.window >= 1,
            f"window must be a whole number from 1 on, got {self.window!r}",
        )


class LongSpecHead(nn.Module):
    """The layer, for one target."""

    def __init__(self, config: LongSpecConfig, target: PreTrainedModel) -> None:
        super().__init__()
        self.settings = config
        self.config = LlamaConfig(**config.layer)
        self.target = TargetParts(target)
        width, eps = self.config.hidden_size, self.config.rms_norm_eps
        self.target.check("head", width, self.config.vocab_size)
        self.input_layernorm = LlamaRMSNorm(width, eps)
        self.self_attn = Attention(self.config, 0, width, output_bias=False)
        self.post_self_attention_layernorm = LlamaRMSNorm(width, eps)
        self.cross_attn = CrossAttention(self.config)
        self.post_cross_attention_layernorm = LlamaRMSNorm(width, eps)
        self.mlp = LlamaMLP(self.config)
        self._rotary = [LlamaRotaryEmbedding(self.config)]  # not a module of this one: weights are all that it has

    @classmethod
    def from_target(cls, target: PreTrainedModel, window: int = 512) -> LongSpecHead:
        """A new layer, fp32 on the target's device, of the sizes and rotary positions of the target's last layer."""
        fields = layer_fields(target) | {
            "attention_bias": True,
            "vocab_size": target.config.get_text_config().vocab_size,
        }
        return cls(LongSpecConfig(fields, window), target).to(target.device)

    @classmethod
    def from_pretrained(cls, folder: str | Path, target: PreTrainedModel) -> LongSpecHead:
        """The layer of a folder of ours or of the original's, on the target's device in its dtype.

        Raises FileNotFoundError, and ValueError for other heads, for those of another target, and for damage.
        """
        stored, weights = files.open_folder(folder, *files.WEIGHTS)
        own = files.own_config(stored, "longspec", Path(folder))
        if own is None:
            weights = files.renamed(weights, {}, r"cross_attn\.[kv]_proj\..*|.*inv_freq")

        def make() -> LongSpecHead:
            if own is not None:
                return cls(LongSpecConfig(**own), target)
            fields = {name: stored[name] for name in LAYER_FIELDS if stored.get(name) is not None}
            fields |= {"num_hidden_layers": 1, "vocab_size": stored["vocab_size"]}
            fields |= {"attention_bias": "self_attn.q_proj.bias" in weights}
            return cls(LongSpecConfig(fields), target)

        head = files.built(make, folder)
        files.fill(head, weights, folder)
        return head.to(device=target.device, dtype=target.dtype).eval()

    @property
    def device(self) -> torch.device:
        return self.input_layernorm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.input_layernorm.weight.dtype

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Of positions int64 [rows, tokens]."""
        self._rotary[0] = self._rotary[0].to(positions.device)
        return self._rotary[0](self.input_layernorm.weight, positions)

    def keys(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values [rows, key heads, tokens, head_dim] of tokens int64 [rows, tokens]: they depend on
        the token and its position alone."""
        x = self.input_layernorm(self.target.embed(ids).to(self.dtype))
        _, k, v = self.self_attn.project(x, self.rotation(positions))
        return k, v

    def step(self, ids: Tensor, positions: Tensor, attend: Attend, cross: Cross) -> Tensor:
        """States [rows, tokens, width] after tokens int64 [rows, tokens]; `logits` reads them. attend, cross: what the
        tokens see of their own kind, and of the target's keys."""
        x = self.target.embed(ids).to(self.dtype)
        rotation = self.rotation(positions)
        x = x + self.self_attn.join(attend(*self.self_attn.project(self.input_layernorm(x), rotation)))
        q = self.cross_attn.project(self.post_self_attention_layernorm(x), rotation)
        x = x + self.cross_attn.join(cross(q))
        return x + self.mlp(self.post_cross_attention_layernorm(x))

    def logits(self, states: Tensor) -> Tensor:
        """The target's output layer [..., width] -> [..., vocabulary]."""
        return self.target.output(states)

    def forward(self, ids: Tensor, positions: Tensor, keys: Tensor, values: Tensor, lag: int = 1) -> Tensor:
        """States [rows, tokens, width] for whole texts, as in training: token t sees the target's keys of tokens 0 to
        t - lag (none: its cross-attention gives zero), as if it were drafted `lag` tokens after the last verified one.

        ids, positions: int64 [rows, tokens].  keys, values: of the target's last layer, rotated, [rows, key heads,
        tokens, head_dim].
        """
        order = torch.arange(ids.shape[1], device=ids.device)
        behind = order[:, None] - order
        near = None if len(order) <= self.settings.window else (behind >= 0) & (behind <= self.settings.window)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=near, is_causal=near is None, enable_gqa=True)

        def cross(q: Tensor) -> Tensor:
            read = max(len(order) - lag, 0)
            k, v = (x[:, :, :read].to(q.dtype) for x in (keys, values))
            late = F.scaled_dot_product_attention(q[:, :, lag:], k, v, is_causal=True, enable_gqa=True)
            return F.pad(late, (0, 0, min(lag, len(order)), 0))

        return self.step(ids, positions, attend, cross)


class CrossAttention(nn.Module):
    """Queries and output of an attention to keys that another model has made."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, all_heads = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(width, all_heads, bias=config.attention_bias)
        self.o_proj = nn.Linear(all_heads, width, bias=False)

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Rotated queries [rows, heads, tokens, head_dim] of states [rows, tokens, width]."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return apply_rotary_pos_emb(q, q, *rotation)[0]

    def join(self, out: Tensor) -> Tensor:
        """States of what the queries have found, [rows, heads, tokens, head_dim]."""
        return self.o_proj(out.transpose(1, 2).flatten(2))
