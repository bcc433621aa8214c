"""Pooling, selection and the probe by kernels where there are such: `triton_draft` and `triton_probe` on a GPU,
`cpu_probe` on a CPU; elsewhere as `core` does them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from draftdiff.core import draft, probe
from draftdiff.core import select as rules
from draftdiff.core.draft import Tail
from draftdiff.core.grid import Tiling
from draftdiff.kernels.block_sparse import preferred_on, unavailable


def _fused(device: torch.device, dtype: torch.dtype = torch.float32, head_dim: int = 64) -> bool:
    return "triton" in preferred_on(device) and unavailable("triton", device, dtype, head_dim) is None


def pool(x: Tensor, tiling: Tiling) -> Tensor:
    """`core.draft.pool`."""
    if not _fused(x.device) or (torch.is_grad_enabled() and x.requires_grad):  # one launch keeps nothing for gradients
        return draft.pool(x, tiling)
    from draftdiff.kernels import triton_draft

    return triton_draft.pool(x, tiling)


def select(rule: str, probabilities: Tensor, density: Tensor) -> Tensor:
    """`core.select.select`."""
    if rule == "draft" and _fused(probabilities.device):
        from draftdiff.kernels import triton_draft

        if probabilities.shape[-1] <= triton_draft.MOST_TILES:
            return triton_draft.select_draft(probabilities, density)
    return rules.select(rule, probabilities, density)


def errors(q_mean: Tensor, k: Tensor, v: Tensor, means: Tail, tiling: Tiling, *, scale: float) -> Tensor:
    """`core.probe.errors`."""
    return _probe(k, tiling).errors(q_mean, k, v, means, tiling, scale=scale)


def worst(error: Tensor, density: Tensor, rows: Tensor | None = None) -> Tensor:
    """`core.probe.worst`."""
    if _fused(error.device):
        from draftdiff.kernels import triton_probe

        if error.shape[-1] <= triton_probe.MOST:
            return triton_probe.worst(error, density, rows)
    return probe.worst(error, density, rows)


def singles(
    q_mean: Tensor, k: Tensor, v: Tensor, means: Tail, tiling: Tiling, keep: Tensor, *, scale: float, tokens: int
) -> tuple[Tensor, Tensor | None]:
    """`core.probe.singles`, which may be more in some rows than in others, and where that is known how many are taken
    of each tile: for a `Problem`."""
    found = _probe(k, tiling).singles(q_mean, k, v, means, tiling, keep, scale=scale, tokens=tokens)
    return found if isinstance(found, tuple) else (found, None)


def _probe(k: Tensor, tiling: Tiling) -> Any:
    if _fused(k.device, k.dtype, k.shape[-1]):
        from draftdiff.kernels import triton_probe

        if triton_probe.fits(tiling):
            return triton_probe
    if "cpu" in preferred_on(k.device) and unavailable("cpu", k.device, torch.float32, k.shape[-1]) is None:
        from draftdiff.kernels import cpu_probe

        return cpu_probe
    return probe
