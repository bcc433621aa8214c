"""Attention over single tokens by itself, merged into what was made of the tiles: for one that reads tiles only."""

from __future__ import annotations

import torch
from torch import Tensor

from draftdiff.kernels.problem import Problem
from draftdiff.kernels.torch_backend import from_tiles, to_tiles

_ELEMENTS = 1 << 26  # of gathered keys, held at once


def merge(problem: Problem, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over tiles and single tokens. out, lse: of the same problem over its tiles."""
    both_out, both = merged(out, lse, *_attention(problem))
    return both_out.to(out.dtype), both


def merged(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, fp32, from the output and the log-sum-exp over each; `more` is 0 for rows that
    have none of its keys."""
    both = torch.logaddexp(lse, more_lse)
    share = (lse - both).exp()[..., None]  # where a row reads nothing at all both are -inf, and out is 0
    more_share = (more_lse - both).exp()[..., None]
    empty = (both == float("-inf"))[..., None]
    sum_of_both = out.float() * share.masked_fill(empty, 0.0) + more.float() * more_share
    # A row that has none of the other keys keeps what it has, NaN included; 0 times what it does not read is 0.
    return torch.where(more_lse[..., None] == float("-inf"), out.float(), sum_of_both), both


def _attention(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output, fp32 and like q, 0 for rows without single tokens, and log-sum-exp [batch, tokens, heads], there -inf."""
    tiling, positions = problem.tiling, problem.tokens
    assert positions is not None
    batch, heads, tiles, count = positions.shape
    q = to_tiles(problem.q, tiling.slots)
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:-1], float("-inf"), device=q.device)
    few = max(1, _ELEMENTS // max(1, count * q.shape[-1]))
    for b in range(batch):
        for h in range(heads):
            k, v = problem.k[b, :, h], problem.v[b, :, h]
            for rows in torch.arange(tiles, device=q.device).split(few):
                there = positions[b, h, rows] >= 0
                at = positions[b, h, rows].clamp(min=0)
                keys, values = (x[at].masked_fill(~there[..., None], 0).float() for x in (k, v))
                scores = torch.bmm(q[b, h, rows].float(), keys.mT) * problem.factor  # half precision would round them
                scores = scores.masked_fill(~there[:, None], float("-inf"))
                some = there.any(-1)[:, None, None]
                weights = scores.masked_fill(~some, 0.0).softmax(-1)
                out[b, h, rows] = torch.bmm(weights, values)
                lse[b, h, rows] = scores.logsumexp(-1)
    return from_tiles(out, tiling), from_tiles(lse[..., None], tiling)[..., 0]
