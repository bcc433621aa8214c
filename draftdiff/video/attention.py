"""Draft attention for an attention layer of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from draftdiff.attention.attend import attend, attend_op, needs_gradient, packed_places
from draftdiff.core.devices import exact_dtype
from draftdiff.core.draft import softmax_scale
from draftdiff.core.grid import LatentGrid
from draftdiff.core.values import plain, whole
from draftdiff.kernels.problem import check_mask, check_tensors
from draftdiff.video.config import DraftAttentionConfig


def draft_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: LatentGrid | Sequence[int],
    config: DraftAttentionConfig | float | Mapping[str, Any] | None = None,
    lead: int = 0,
    text_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention over video tokens (and text) that computes only the tiles a low-resolution draft finds worth it.

    q, k, v: [batch, tokens, heads, head_dim] after normalisation and rotary embedding, in the model's order; gradients
    reach all three.  grid: (frames, height, width) of the video tokens, in raster order; all other tokens count as
    text, which is always computed.  config: also a sparsity or a dict of its fields.  lead: how many text tokens stand
    before the video.  text_mask: bool [batch, text], False for padding; numbers might be meant to be added, and are
    refused.  scale: of the scores, 1/sqrt(head_dim) if None.
    Returns the output like q. Raises ValueError in one line for what does not fit.
    """
    check_tensors(q, k, v)
    grid, lead, scale = LatentGrid.of(grid), whole("lead", lead), softmax_scale(plain(scale), q.shape[-1])
    if text_mask is not None:
        check_mask(text_mask, q)
    config = DraftAttentionConfig.of(config)
    density = config.budget.density(1, q.shape[2])[0]
    dtype = exact_dtype(q.device)
    if config.budget.heads:
        density = density.to(q.device, dtype)
    else:  # made on the device: a copy from the host could not be captured in a CUDA graph
        density = torch.full((q.shape[2],), float(density[0]), dtype=dtype, device=q.device)
    if torch.compiler.is_compiling() or needs_gradient(q, k, v):
        return attend_op(q, k, v, density, text_mask, packed_places(grid.shape, lead), scale, config.rule.packed)[0]
    return attend(q, k, v, density, config.rule, grid=grid, lead=lead, text_mask=text_mask, scale=scale)[0]
