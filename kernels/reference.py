"""The truth that every other backend is held against: one dense masked softmax in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from draftdiff.kernels.problem import Problem

differentiable = True
reads_tokens = True


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return None


def run(problem: Problem, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    q, tiling, keep, tile_of = problem.q, problem.tiling, problem.keep, problem.tile_of
    q32, k32, values = (x.float().transpose(1, 2) for x in (q, problem.k, problem.v))
    scores = q32 @ k32.transpose(-1, -2) * problem.factor
    read = keep[:, :, :, tile_of]
    if problem.tokens is not None:
        found = problem.tokens >= 0
        singles = read[:, :, : tiling.video_tiles].new_zeros(*found.shape[:3], tiling.tokens + 1)
        singles.scatter_(-1, problem.tokens.where(found, tiling.tokens).long(), True)
        read[:, :, : tiling.video_tiles] |= singles[..., :-1]
    hidden = ~read[:, :, tile_of]
    if problem.text_mask is not None:
        absent = torch.zeros(q.shape[0], tiling.tokens, dtype=torch.bool, device=q.device)
        absent[:, tiling.order[tiling.video_tokens :]] = ~problem.text_mask
        hidden = hidden | absent[:, None, None]
    if problem.tail is not None:
        weight = problem.log_counts.expand(*keep.shape[:3], -1)[:, :, tile_of]
        pooled = q32 @ problem.tail.k_mean.transpose(-1, -2) * problem.factor + weight
        scores = torch.cat([scores, pooled], dim=-1)
        empty_tiles = keep[..., : tiling.video_tiles][:, :, tile_of] | (weight == float("-inf"))
        hidden = torch.cat([hidden, empty_tiles], dim=-1)
        values = torch.cat([values, problem.tail.v_mean], dim=2)
    # Not by turning NaN into 0, which would hide those of the inputs and give NaN gradients.
    empty = hidden.all(-1, keepdim=True)
    scores = scores.masked_fill(hidden & ~empty, float("-inf"))
    # A weight of 0 times NaN is NaN: what is not finite counts by who reads it.
    finite = values.isfinite()
    spoilt = (~hidden).float() @ (~finite).float() > 0
    out = scores.softmax(-1) @ values.masked_fill(~finite, 0.0)
    out = out.masked_fill(spoilt, float("nan")).masked_fill(empty, 0.0)
    lse = scores.logsumexp(-1).masked_fill(empty[..., 0], float("-inf")).transpose(1, 2) if want_lse else None
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse
