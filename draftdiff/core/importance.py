"""Which keys matter to a few queries, and a cache cut down to them.

The steps that cache compression methods share (SnapKV, arXiv 2404.14469; ScaleKV, arXiv 2505.19602; SpecKV and SpecPC,
arXiv 2506.08373): score keys by attention from chosen queries, smooth over neighbours, keep the best.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from draftdiff.core.draft import softmax_scale
from draftdiff.errors import UserError

POOLINGS = ("max", "average")
REDUCTIONS = ("sum", "mean", "max")


def attention_mass(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduce: str = "sum",
) -> Tensor:
    """Softmax attention that each key gets from all given queries together, fp32 [batch, key heads, keys].

    query: [batch, heads, queries, head_dim].  key: [batch, key heads, keys, head_dim]; several query heads may share a
    key head, and their masses are reduced together.  scale: of the scores, 1/sqrt(head_dim) if None.  softcap: bounds
    the scores to +-softcap by tanh, as Gemma 2 does.  sinks: scores [heads] of a key that takes
    attention and is none of these, as in GPT-OSS.  mask: bool [batch or 1, 1, queries, keys], True where a query
    reads a key; a query that reads nothing gives nothing.  weights: of the queries, [queries] or [batch, queries].
    reduce: over queries and the heads that share a key head, one of REDUCTIONS.
    Raises ValueError for another reduction.
    """
    if reduce not in REDUCTIONS:
        raise UserError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    scale = softmax_scale(scale, query.shape[-1])
    groups = query.unflatten(1, (key.shape[1], -1))
    scores = (groups.flatten(2, 3) @ key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if mask is not None:
        scores = scores.unflatten(2, groups.shape[2:4]).masked_fill(~mask[:, :, None], -torch.inf).flatten(2, 3)
    if sinks is not None:
        sink = sinks.float().unflatten(0, (key.shape[1], -1)).repeat_interleave(groups.shape[3], dim=1)
        scores = torch.cat([scores, sink[..., None].expand(len(scores), -1, -1, 1)], dim=-1)
    mass = scores.softmax(-1)[..., : key.shape[2]]
    if mask is not None:
        mass = mass.nan_to_num(0.0)
    if weights is not None:
        rows = weights.expand(len(query), -1)[:, None, None, :, None]
        mass = (mass.unflatten(2, groups.shape[2:4]) * rows).flatten(2, 3)
    if reduce == "sum":
        return mass.sum(2)
    return mass.amax(2) if reduce == "max" else mass.mean(2)


def smooth(scores: Tensor, kernel: int = 5, pooling: str = "average") -> Tensor:
    """Scores [..., keys] pooled over `kernel` neighbours in key order, so that a key's context stays with it.

    An even kernel reaches one further to the right.  The average counts missing neighbours at the ends as 0.
    """
    if pooling not in POOLINGS:
        raise UserError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    if kernel < 1:
        raise UserError(f"kernel must be positive, got {kernel}")
    pool = F.max_pool1d if pooling == "max" else F.avg_pool1d
    if kernel % 2:
        return pool(scores, kernel, stride=1, padding=kernel // 2)
    before, after = (kernel - 1) // 2, kernel // 2
    return pool(F.pad(scores, (before, after), value=-torch.inf if pooling == "max" else 0.0), kernel, stride=1)


def keep_topk(scores: Tensor, count: int, always: Tensor | None = None) -> Tensor:
    """The `count` best keys of each row, int64 [batch, heads, count], ascending.

    scores: [batch, heads, keys].  always: int64 [n], keys that are kept in every row whatever they score, n <= count.
    """
    if always is None:
        return scores.topk(count, dim=-1).indices.sort(-1).values
    lowest = torch.finfo(scores.dtype).min
    rest = scores.clamp(min=lowest).index_fill(-1, always, -torch.inf)
    best = rest.topk(count - len(always), dim=-1).indices
    return torch.cat([always.expand(*best.shape[:-1], -1), best], dim=-1).sort(-1).values


def importance_order(scores: Tensor, ties: Tensor) -> Tensor:
    """Keys from best to worst, int64 like scores [..., keys]; of equals the one of the higher `ties`, then the first.

    Pooling by the maximum makes plateaus: with the scores before it as `ties`, a peak comes before its neighbours.
    """
    by_ties = ties.argsort(dim=-1, descending=True, stable=True)
    return by_ties.gather(-1, scores.gather(-1, by_ties).argsort(dim=-1, descending=True, stable=True))


def gather_kv(key: Tensor, value: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [batch, heads, keys, head_dim] at indices [batch, heads, kept], in memory of their own.

    Values may have another head_dim than keys.
    """
    return key.gather(2, _places(indices, key)), value.gather(2, _places(indices, value))


def _places(indices: Tensor, x: Tensor) -> Tensor:
    return indices[..., None].expand(-1, -1, -1, x.shape[-1])
