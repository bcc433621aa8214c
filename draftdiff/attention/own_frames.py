"""Attention beside frames of a reference, each of which the queries of one frame alone read: two attentions, merged by
their log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from draftdiff.core.grid import LatentGrid, choose_tile, tiling_for
from draftdiff.kernels.block_sparse import block_sparse_attention_lse
from draftdiff.kernels.problem import Problem
from draftdiff.kernels.single_tokens import merged


def attention(problem: Problem, k: Tensor, v: Tensor, *, backend: str) -> Tensor:
    """The output of a problem, like q, whose queries of the grid's last frames also read their own of these keys.

    k, v: [batch, tokens, heads, head_dim], the frames of the reference one after another, as many as have readers.
    """
    out, lse = block_sparse_attention_lse(problem, backend=backend)
    part, block = problem.tiling.parts[0], problem.tiling.block_size
    frame = LatentGrid(1, part.grid.height, part.grid.width)
    readers = slice(part.stop - k.shape[1], part.stop)
    each = [x.unflatten(1, (-1, frame.tokens)).flatten(0, 1) for x in (problem.q[:, readers], k, v)]
    tiling = tiling_for(frame, choose_tile(frame, block), block, device=problem.tiling.device)
    keep = torch.ones(len(each[0]), k.shape[2], tiling.tiles, tiling.tiles, dtype=torch.bool, device=k.device)
    found = block_sparse_attention_lse(Problem(*each, keep, tiling, scale=problem.scale), backend=backend)
    more, more_lse = (x.unflatten(0, (len(k), -1)).flatten(1, 2) for x in found)
    both, _ = merged(out[:, readers], lse[:, readers], more, more_lse)
    return torch.cat([out[:, : readers.start], both.to(out.dtype), out[:, readers.stop :]], dim=1)
