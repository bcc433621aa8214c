"""Block-sparse attention over tiles: one function, its checks, and the registry of backends behind it.

A backend is a module of this folder with two functions: `unavailable(device, dtype, head_dim)`, the reason why it
cannot serve such a call or None, and `run(q, k, v, mask, tiling, text_mask, tail, scale, want_lse) -> (out, lse)`,
with lse None unless it was wanted.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from draftdiff.core.draft import Tail
from draftdiff.core.grid import Tiling
from draftdiff.core.select import BlockMask

_MODULES = {"reference": "reference", "torch": "gather", "cpu": "cpu", "flex": "flex", "triton": "triton_sparse"}
BACKENDS = tuple(_MODULES)
_PREFERRED = {"cuda": ("triton", "flex", "torch"), "cpu": ("cpu", "torch")}


def backend_module(name: str) -> ModuleType:
    """The module of a backend. Raises ValueError for a name that is not in BACKENDS."""
    if name not in _MODULES:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return import_module(f"draftdiff.kernels.{_MODULES[name]}")


def unavailable(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend cannot serve such a call, or None if it can."""
    return backend_module(name).unavailable(device, dtype, head_dim)


@lru_cache(maxsize=64)
def resolve(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The backend that serves a call. `auto` takes the fastest that can, with one warning if that is not the first
    choice of the device; a named backend that cannot serve raises ValueError with its reason."""
    if name != "auto":
        reason = unavailable(name, device, dtype, head_dim)
        if reason:
            raise ValueError(f"backend {name!r} cannot run here: {reason}")
        return name
    refused: list[str] = []
    for candidate in _PREFERRED.get(device.type, ("torch",)):
        reason = unavailable(candidate, device, dtype, head_dim)
        if reason is None:
            if refused:
                warnings.warn(f"draftdiff uses the {candidate!r} backend: {'; '.join(refused)}", stacklevel=2)
            return candidate
        refused.append(f"{candidate} {reason}")
    raise ValueError(f"no backend serves {device}, {dtype}, head_dim {head_dim}: {'; '.join(refused)}")


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    tiling: Tiling,
    text_mask: Tensor | None = None,
    tail: Tail | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the kept tiles, exact, and over the skipped ones through the tail.

    q, k, v: [batch, tokens, heads, head_dim] in the model's order, fp32, bf16 or fp16.
    mask: kept tiles, [batch, heads, tiles, tiles].  text_mask: bool [batch, text], False for padding, which none reads.
    tail: pooled keys and values of the video tiles, or None to drop what is skipped.  scale: 1/sqrt(head_dim) if None.
    Returns out like q in the same order, contiguous; with return_lse also the natural log-sum-exp, fp32
    [batch, tokens, heads].
    A row with no key at all gives 0. Raises ValueError for shapes that do not fit the tiling.
    """
    batch, tokens, heads, head_dim = q.shape
    if k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"q, k and v must have one shape, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if tokens != tiling.tokens:
        raise ValueError(
            f"q has {tokens} tokens, the grid {tiling.grid} with {tiling.text} text tokens has {tiling.tokens}"
        )
    if mask.keep.shape != (batch, heads, tiling.tiles, tiling.tiles):
        raise ValueError(f"mask must be {(batch, heads, tiling.tiles, tiling.tiles)}, got {tuple(mask.keep.shape)}")
    if text_mask is not None and text_mask.shape != (batch, tiling.text):
        raise ValueError(f"text_mask must be {(batch, tiling.text)}, got {tuple(text_mask.shape)}")
    name = resolve(backend, q.device, q.dtype, head_dim)
    scale = scale or 1 / math.sqrt(head_dim)
    out, lse = backend_module(name).run(q, k, v, mask, tiling, text_mask, tail, scale, return_lse)
    return (out, lse) if return_lse else out
