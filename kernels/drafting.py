"""Pooling and selection where `triton` serves: in few fused launches (`triton_draft`); elsewhere as `core` does it."""

from __future__ import annotations

import torch
from torch import Tensor

from draftdiff.core import draft
from draftdiff.core import select as rules
from draftdiff.core.grid import Tiling
from draftdiff.kernels.block_sparse import preferred_on, unavailable


def _fused(device: torch.device) -> bool:
    return "triton" in preferred_on(device) and unavailable("triton", device, torch.float32, 64) is None


def pool(x: Tensor, tiling: Tiling) -> Tensor:
    """`core.draft.pool`."""
    if not _fused(x.device) or (torch.is_grad_enabled() and x.requires_grad):  # one launch keeps nothing for gradients
        return draft.pool(x, tiling)
    from draftdiff.kernels import triton_draft

    return triton_draft.pool(x, tiling)


def select(rule: str, probabilities: Tensor, density: Tensor, *, row_floor: float = 0.5) -> Tensor:
    """`core.select.select`."""
    if rule == "draft" and _fused(probabilities.device):
        from draftdiff.kernels import triton_draft

        if probabilities.shape[-1] <= triton_draft.MOST_TILES:
            return triton_draft.select_draft(probabilities, density, row_floor=row_floor)
    return rules.select(rule, probabilities, density, row_floor=row_floor)
