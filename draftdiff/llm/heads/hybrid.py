"""Attention over two sets of keys, exact: each part by itself, merged by the sums of their exponentials (LongSpec,
arXiv 2502.17421). So a tree of drafts, which needs a mask, is kept apart from the text before it."""

from __future__ import annotations

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor, Tensor]  # keys, values [rows, key heads, m, head_dim], mask bool [rows or 1, n, m]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of queries [rows, heads, n, head_dim] over keys with as many heads or a divisor of them, in fp32.

    Output as q, and the logarithm of the sum of exponentials [rows, heads, n]; 0 and -inf where a query sees no key.
    """
    group = q.shape[1] // k.shape[1]
    grouped = q.float().unflatten(1, (-1, group)).flatten(2, 3)
    scores = (grouped @ k.float().transpose(-1, -2)).unflatten(2, (group, -1)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]).exp()
    out = (weights.flatten(2, 3) @ v.float()).unflatten(2, (group, -1))
    return out.flatten(1, 2), lse.flatten(1, 2)


def share(prefix_lse: Tensor, tree_lse: Tensor) -> Tensor:
    """What weight the prefix has in the merged output, [rows, heads, n, 1]."""
    return (prefix_lse - tree_lse).sigmoid()[..., None]


def hybrid(q: Tensor, prefix: Part, tree: Part) -> Tensor:
    """Attention over the keys of both parts. Each query must see a key of the tree, at least its own."""
    before, prefix_lse = attend(q, *prefix)
    out, tree_lse = attend(q, *tree)
    return out.lerp(before, share(prefix_lse, tree_lse)).to(q.dtype)
