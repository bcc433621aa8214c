"""Attention of a few queries from its definition: what kernels are held against where all queries would be too many."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from draftdiff.kernels.problem import Problem


def some_rows(problem: Problem, number: int = 32) -> tuple[Tensor, Tensor]:
    """Positions of queries that are asked for, the first and the last among them, and heads, the first and the last:
    int64 [any] each."""
    device, heads = problem.q.device, problem.q.shape[2]
    slots = problem.tiling.slots if problem.queries is None else problem.tiling.slots[problem.queries]
    asked = slots[slots >= 0].sort().values
    generator = torch.Generator().manual_seed(1)
    rows = torch.cat([torch.randint(len(asked), (number,), generator=generator), torch.tensor([0, len(asked) - 1])])
    return asked[rows.to(device)], torch.tensor(sorted({0, heads - 1}), device=device)


def attention_of(problem: Problem, rows: Tensor, heads: Tensor) -> Tensor:
    """Outputs of the first item's queries at `rows`, as a `Problem` defines them: fp32 [rows, heads, head_dim]."""
    tiling, device = problem.tiling, problem.q.device
    q, k, v = (x[0][:, heads].float().transpose(0, 1) for x in (problem.q[:, rows], problem.k, problem.v))
    tile_of, video = problem.tile_of, tiling.video_tiles
    own = tile_of[rows]
    keep = problem.keep[0, heads][:, own]
    read = keep[..., tile_of]
    if problem.tokens is not None:
        tokens = F.pad(problem.tokens[0, heads], (0, 0, 0, tiling.tiles - video), value=-1)[:, own]  # of text none
        single = torch.zeros(*read.shape[:2], tiling.tokens + 1, dtype=torch.bool, device=device)
        single.scatter_(-1, tokens.long() % (tiling.tokens + 1), True)  # -1 is the last place
        read = read | single[..., :-1]
    if problem.text_mask is not None:
        absent = torch.zeros(tiling.tokens, dtype=torch.bool, device=device)
        absent[tiling.order[tiling.video_tokens :]] = ~problem.text_mask[0]
        read = read & ~absent
    scores = (q @ k.transpose(-1, -2) * problem.factor).masked_fill(~read, -math.inf)
    if problem.tail is not None:
        counts = problem.log_counts
        counts = counts if counts.dim() == 1 else counts[0, heads][:, own]
        pooled = q @ problem.tail.k_mean[0, heads].transpose(-1, -2) * problem.factor + counts
        scores = torch.cat([scores, pooled.masked_fill(keep[..., :video], -math.inf)], -1)
        v = torch.cat([v, problem.tail.v_mean[0, heads]], 1)
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    return (weights @ v).transpose(0, 1)
