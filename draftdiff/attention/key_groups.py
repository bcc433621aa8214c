"""Attention whose mask adds the same number to all of a few groups of keys: the softmax over all of them is each
group's own, weighed by its log-sum-exp with the number added. No kernel has to know of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from draftdiff.core.grid import LatentGrid
from draftdiff.kernels.block_sparse import block_sparse_attention, block_sparse_attention_lse
from draftdiff.kernels.problem import Problem
from draftdiff.kernels.single_tokens import merged

MOST = 8  # groups: each is a call of the kernel


@dataclass(frozen=True, eq=False)
class KeyGroups:
    """of: int64 [keys], the group of each key.  bias: fp32 [batch, queries, groups], finite, what the mask adds to the
    scores of each query with a group's keys; what it adds to those with all keys alike says nothing."""

    of: Tensor
    bias: Tensor

    @classmethod
    def found_in(cls, mask: Tensor, first: int) -> KeyGroups | None:
        """The groups of a mask that is added to the scores, [batch, queries, keys], the key at `first` in group 0; None
        if there are more than MOST, or a number that is not finite."""
        of = torch.full(mask.shape[2:], -1, device=mask.device)
        columns: list[Tensor] = []
        at = first
        while len(columns) < MOST:
            columns.append(mask[..., at])
            of[(mask == columns[-1][..., None]).flatten(0, 1).all(0)] = len(columns) - 1
            left = (of < 0).nonzero()
            if not len(left):
                bias = torch.stack(columns, dim=-1).float()
                # Of numbers in the thousands a sum with a score would keep few digits.
                return cls(of, bias - bias.amax(-1, keepdim=True)) if bool(bias.isfinite().all()) else None
            at = int(left[0])
        return None

    def is_first(self, start: int, grid: LatentGrid) -> bool:
        """Whether the tokens of a grid are of group 0."""
        return not bool(self.of[start : start + grid.tokens].any())


def attention(problem: Problem, groups: KeyGroups, *, backend: str) -> Tensor:
    """The output of a problem, like q, whose scores have a bias. groups: of all its tokens; those in a grid are of
    group 0."""
    tiling = problem.tiling
    of_text = groups.of[tiling.order[tiling.video_tokens :]]
    if groups.bias.shape[-1] == 1:
        return block_sparse_attention(problem, backend=backend)
    out = lse = None
    for group in range(groups.bias.shape[-1]):
        flags = (of_text == group).expand(problem.q.shape[0], -1)
        flags = flags if problem.text_mask is None else flags & problem.text_mask
        part = replace(problem, text_mask=flags) if group == 0 else _of_text(problem, flags)
        more, its = block_sparse_attention_lse(part, backend=backend)
        its = its + groups.bias[..., group, None]
        out, lse = (more, its) if out is None or lse is None else merged(out, lse, more, its)
    assert out is not None
    return out.to(problem.q.dtype)


def _of_text(problem: Problem, flags: Tensor) -> Problem:
    """A problem over these tokens of the text alone."""
    tiling = problem.tiling
    some = tiling.readable(flags).any(-1)
    some[:, : tiling.video_tiles] = False
    keep = some[:, None, None].expand_as(problem.keep).contiguous()
    return replace(problem, keep=keep, text_mask=flags, tail=None, tokens=None, taken=None)
