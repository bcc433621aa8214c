"""What the next-scale transformers share: cosine attention over earlier scales, AdaLN modulation, and the forward from
latents to logits around their blocks.

Sources: VAR (arXiv 2404.02905), section 3; Infinity (arXiv 2412.04431), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from draftdiff.var.cache import KVCache, Place
from draftdiff.var.checkpoint import OriginalCheckpointMixin
from draftdiff.var.last_scales import attend_scale

LARGEST_SCALE = math.log(100)

Value = TypeVar("Value")


@dataclass(frozen=True)
class Step:
    """What a forward hands to its layers.

    lengths: tokens of each of its scales, which follow each other.  cache: holds the earlier scales of every layer, and
    these afterwards if `keep`.  rotate: of queries and keys.  layer: the number of the layer that reads this.
    """

    lengths: Sequence[int]
    cache: KVCache | None = None
    keep: bool = True
    rotate: Callable[[Tensor], Tensor] | None = None
    layer: int = 0

    @torch.compiler.disable  # as the functions below
    def once(self, name: Any, compute: Callable[[], Value]) -> Value:
        """What the condition of a generation fixes: computed at its first step, or without a cache at each."""
        return compute() if self.cache is None else self.cache.once(name, compute)


class CosineAttention(nn.Module):
    """Self-attention in which a token of one scale reads that scale and all earlier ones.

    With `qk_norm`, queries and keys are unit vectors, and the queries of a head are stretched by a learned temperature
    of at most 100. The bias of the keys is zero in all released weights.
    """

    def __init__(self, dim: int, heads: int, qk_norm: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.softmax_scale = 1.0 if qk_norm else 0.25 / math.sqrt(dim // heads)
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(4))) if qk_norm else None
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x: [batch, tokens, dim], of the scales of this step."""
        qkv = self.to_qkv(x)
        q, k, v = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=self.heads)
        projected = q
        if self.log_scale is not None:
            stretch = self.log_scale.float().clamp(max=LARGEST_SCALE).exp()[:, None, None]
            q, k = F.normalize(q.float(), dim=-1) * stretch, F.normalize(k.float(), dim=-1)
        if step.rotate is not None:
            q, k = step.rotate(q.float()), step.rotate(k.float())
        q = q.to(v.dtype)

        def raw_query(heads: slice | Tensor = slice(None)) -> Tensor:
            return (projected - self.to_qkv.bias[: x.shape[-1]].view(self.heads, 1, -1))[:, heads]

        out = None if step.cache is None else _by_groups(step.cache, step, self._attend, q, k, v, raw_query)
        if out is None:
            out = self._attend(step, step.layer, q, k, v, raw_query)
        return self.to_out(rearrange(out, "b h l d -> b l (h d)"))

    def _attend(
        self, step: Step, place: Place, q: Tensor, k: Tensor, v: Tensor, raw_query: Callable[[], Tensor]
    ) -> Tensor:
        """Attention of the heads at a place, [batch, heads, tokens, head_dim] each; raw_query: see KVCache.observe."""
        keys, values = (k.to(v.dtype), v) if step.cache is None else _extend(step.cache, place, step.keep, k, v)

        # A call per scale needs no mask: fewer products than under a block-causal one, and the same as without prefill.
        history = keys.shape[2] - q.shape[2]
        last_scales = None if step.cache is None else step.cache.last_scales
        parts, start = [], 0
        for length in step.lengths:
            rows, seen = slice(start, start + length), history + start + length
            part = q[:, :, rows], keys[:, :, :seen], values[:, :, :seen]
            grid = None if last_scales is None else last_scales.grid(length)
            if last_scales is None or grid is None:
                parts.append(F.scaled_dot_product_attention(*part, scale=self.softmax_scale))
            else:
                parts.append(_attend_scale(*part, grid, last_scales.density, self.softmax_scale))
            start += length
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        if step.cache is not None:
            scaled = q if self.softmax_scale == 1 else q * self.softmax_scale
            _observe(step.cache, place, scaled, keys, raw_query)
        return out


# Outside of compiled graphs: a cache differs from layer to layer and scale to scale, and each would be traced anew.
@torch.compiler.disable
def _by_groups(
    cache: KVCache, step: Step, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, raw_query: Callable
) -> Tensor | None:
    """Attention of a layer whose heads hold different numbers of tokens, None of one where they do not."""
    groups = cache.groups(step.layer)
    if not groups:
        return None
    outs = [attend(step, place, q[:, at], k[:, at], v[:, at], partial(raw_query, at)) for place, at in groups]
    return torch.cat(outs, dim=1)[:, torch.cat([at for _, at in groups]).argsort()]


@torch.compiler.disable
def _extend(cache: KVCache, place: Place, keep: bool, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return cache.extend(place, key, value, keep=keep)


@torch.compiler.disable
def _attend_scale(*arguments: Any) -> Tensor:
    return attend_scale(*arguments)


@torch.compiler.disable
def _observe(cache: KVCache, place: Place, query: Tensor, key: Tensor, raw_query: Callable[[], Tensor]) -> None:
    cache.observe(place, query, key, raw_query)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


class AdaLayerNormOut(nn.Module):
    """LayerNorm whose scale and shift come from the condition [batch, dim], before the output head."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(condition))[:, None].chunk(2, dim=-1)
        return modulate(self.norm(x), scale, shift)


class FeedForward(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(dim, hidden)
        self.linear_out = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_out(F.gelu(self.linear_in(x), approximate="tanh"))


class NextScaleModel(OriginalCheckpointMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):
    """What the transformers share: blocks over the tokens of one scale or of several, under the law of the scales."""

    _supports_gradient_checkpointing = True
    blocks: Any

    def _init_weights(self, *parameters: nn.Parameter) -> None:
        """Normal with a deviation of 0.02 for weights of layers and for these parameters, and no bias."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.bias)
        for parameter in parameters:
            nn.init.normal_(parameter, std=0.02)

    def _logits(
        self,
        hidden_states: Tensor | None,
        condition: Tensor,
        block_conditions: Iterable[tuple[Any, ...]],
        step: Step,
        *,
        positions: Tensor | None = None,
        first_scale: int,
        logits_from: int | None,
        return_dict: bool,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Logits of the scales from logits_from on, or of all in the step, which are numbered from first_scale.

        hidden_states: of all scales but scale 0, which starts from the condition [batch, dim].  block_conditions: of
        every block, what it is called with between its tokens and the step.  positions: embeddings, [tokens, dim].
        """
        parts = [condition[:, None] + self.start_embed] if first_scale == 0 else []
        parts += [] if hidden_states is None else [self.proj_in(hidden_states)]
        numbers = torch.arange(first_scale, first_scale + len(step.lengths), device=condition.device)
        levels = torch.cat([level.expand(n, -1) for level, n in zip(self.level_embed(numbers), step.lengths)])
        x = torch.cat(parts, dim=1) + (levels if positions is None else positions + levels)
        for layer, (block, given) in enumerate(zip(self.blocks, block_conditions)):
            arguments = (x, *given, replace(step, layer=layer))
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, *arguments)
            else:
                x = block(*arguments)
        if logits_from is not None:
            x = x[:, sum(step.lengths[: logits_from - first_scale]) :]
        logits = self.proj_out(self.norm_out(x, condition))
        return Transformer2DModelOutput(sample=logits) if return_dict else (logits,)
