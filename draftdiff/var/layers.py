"""What the next-scale transformers share: cosine attention over earlier scales, and AdaLN modulation.

Sources: VAR (arXiv 2404.02905), section 3; Infinity (arXiv 2412.04431), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from draftdiff.var.cache import KVCache
from draftdiff.var.last_scales import attend_scale

LARGEST_SCALE = math.log(100)


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

    def forward(
        self,
        x: Tensor,
        lengths: Sequence[int],
        *,
        cache: KVCache | None = None,
        layer: int = 0,
        keep: bool = True,
        rotate: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """x: [batch, tokens, dim], of one scale or of several that follow each other, `lengths` tokens each.

        cache: holds the earlier scales of `layer`, and these afterwards if `keep`.  rotate: of queries and keys.
        """
        qkv = self.to_qkv(x)
        q, k, v = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=self.heads)
        projected = q
        if self.log_scale is not None:
            stretch = self.log_scale.float().clamp(max=LARGEST_SCALE).exp()[:, None, None]
            q, k = F.normalize(q.float(), dim=-1) * stretch, F.normalize(k.float(), dim=-1)
        if rotate is not None:
            q, k = rotate(q.float()), rotate(k.float())
        q = q.to(v.dtype)
        keys, values = k.to(v.dtype), v
        if cache is not None:
            keys, values = _extend(cache, layer, k, v, keep)

        # A call per scale needs no mask: fewer products than under a block-causal one, and the same as without prefill.
        history = keys.shape[2] - q.shape[2]
        last_scales = None if cache is None else cache.last_scales
        parts, start = [], 0
        for length in lengths:
            rows, seen = slice(start, start + length), history + start + length
            part = q[:, :, rows], keys[:, :, :seen], values[:, :, :seen]
            grid = None if last_scales is None else last_scales.grid(length)
            if last_scales is None or grid is None:
                parts.append(F.scaled_dot_product_attention(*part, scale=self.softmax_scale))
            else:
                parts.append(_attend_scale(*part, grid, last_scales.density, self.softmax_scale))
            start += length
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        if cache is not None:
            bias = self.to_qkv.bias[: x.shape[-1]].view(self.heads, 1, -1)
            scaled = q if self.softmax_scale == 1 else q * self.softmax_scale
            _observe(cache, layer, scaled, keys, projected, bias)
        return self.to_out(rearrange(out, "b h l d -> b l (h d)"))


# Outside of compiled graphs: a cache differs from layer to layer and scale to scale, and each would be traced anew.
@torch.compiler.disable
def _extend(cache: KVCache, layer: int, key: Tensor, value: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return cache.extend(layer, key, value, keep=keep)


@torch.compiler.disable
def _attend_scale(*arguments: Any) -> Tensor:
    return attend_scale(*arguments)


@torch.compiler.disable
def _observe(cache: KVCache, layer: int, query: Tensor, key: Tensor, projected: Tensor, bias: Tensor) -> None:
    cache.observe(layer, query, key, projected, bias)


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
