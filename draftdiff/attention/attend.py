"""Draft attention: the whole method on one page.

DraftAttention (arXiv 2505.14708) on any grid, with per-row budgets and a pooled tail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from draftdiff.attention.rule import Rule, unpack
from draftdiff.core import quality
from draftdiff.core.devices import without_autocast
from draftdiff.core.draft import Tail, draft_map, softmax_scale
from draftdiff.core.grid import LatentGrid, tiling_for
from draftdiff.core.select import with_text
from draftdiff.errors import UserError
from draftdiff.kernels.block_sparse import block_sparse_attention
from draftdiff.kernels.drafting import errors, pool, select, singles, worst
from draftdiff.kernels.problem import Problem, check_tensors

STATS = ("density", "drafted_mass")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    density: Tensor,
    rule: Rule,
    *,
    grid: LatentGrid,
    lead: int = 0,
    text_mask: Tensor | None = None,
    scale: float | None = None,
    part: Callable[[str], AbstractContextManager] = nullcontext,
) -> tuple[Tensor, Tensor]:
    """Attention that computes only the tiles which a low-resolution draft finds worth it.

    q, k, v: [batch, tokens, heads, head_dim] after normalisation and rotary embedding, in the model's order. The grid's
    tokens stand after `lead` others; all tokens outside the grid are computed exactly. q may leave out the tokens
    before the grid where no token follows it: keys without queries.
    density: kept share, float64 [heads].  text_mask: bool [batch, tokens outside the grid], False for padding.
    scale: 1/sqrt(head_dim) if None.  part: a context that is entered with the name of each part, to time it.
    Returns the output like q, and what was done, fp32 [2]: density over all token pairs, and the mass that the draft
    gives to the kept tiles; NaN if q or k hold a NaN. Raises ValueError for shapes that do not fit the grid.
    """
    check_tensors(q, k, v)
    text, absent = k.shape[1] - grid.tokens, k.shape[1] - q.shape[1]
    if text < 0:
        raise UserError(f"k has {k.shape[1]} tokens, fewer than the {grid.tokens} of the grid {grid}")
    if absent and (absent != text or lead != text):
        raise UserError(f"q has {q.shape[1]} tokens, needs the grid's {grid.tokens} or all {k.shape[1]} of k")
    tiling = tiling_for(grid, *rule.tile_for(grid), text, lead, q.device)
    scale = softmax_scale(scale, q.shape[-1])
    if absent:
        q = torch.cat([q.new_zeros(q.shape[0], absent, *q.shape[2:]), q], dim=1)
    with without_autocast(q.device):
        with part("draft"):
            q_mean, k_mean = pool(q, tiling), pool(k, tiling)
            # The paper's map weighs all tiles alike, also ragged ones.
            counts = None if rule.selection == "upstream" else tiling.counts[: tiling.video_tiles]
            probabilities = draft_map(q_mean, k_mean, scale=scale, counts=counts)
            tail = Tail(k_mean, pool(v, tiling)) if rule.tail else None
        with part("select"):
            tokens = taken = None
            single = rule.singles_of(grid)
            in_tiles = (density - single / grid.tokens).clamp(min=0).where(density < 1, density)
            # Where there is no tail nothing stands for what is skipped.
            means = tail or Tail(k_mean, torch.zeros_like(k_mean))
            if rule.selection == "error":
                kept = worst(errors(q_mean, k, v, means, tiling, scale=scale), in_tiles)
            else:
                kept = select(rule.selection, probabilities, in_tiles)
            if single:
                tokens, taken = singles(q_mean, k, v, means, tiling, kept, scale=scale, tokens=single)
            keep = with_text(kept, tiling)
            if absent:  # tiles without queries read nothing
                keep[:, :, tiling.video_tiles :] = False
            mass = quality.drafted_mass(probabilities, kept).mean()
            stats = torch.stack([quality.density(keep, tiling, tokens, taken).mean(), mass])
        with part("kernel"):
            problem = Problem(q, k, v, keep, tiling, text_mask, tail, scale, tokens, taken, rule.precision)
            out = block_sparse_attention(problem, backend=rule.backend)
    return out[:, absent:], stats


def compute_dtype(x: Tensor) -> torch.dtype:
    """What attention computes in: x's own type, or that of the autocast region around the call."""
    kind = x.device.type
    within = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if within else x.dtype


def needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


@torch.library.custom_op("draftdiff::attend", mutates_args=())
def attend_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    density: Tensor,
    text_mask: Tensor | None,
    grid: list[int],
    lead: int,
    scale: float | None,
    rule: str,
) -> tuple[Tensor, Tensor]:
    """`attend` as one node of a compiled or differentiated graph. grid: (frames, height, width). rule: its `packed`."""
    return attend(q, k, v, density, unpack(rule), grid=LatentGrid(*grid), lead=lead, text_mask=text_mask, scale=scale)


@attend_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, density: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(len(STATS), dtype=torch.float32)


@contextmanager
def _recorded() -> Iterator[None]:
    """Operations inside are recorded for gradients, also in the body of an op, where PyTorch switches that off."""
    with torch._C._PreserveDispatchKeyGuard(), torch.enable_grad():
        torch._C._dispatch_tls_set_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality, False)
        yield


@torch.library.custom_op("draftdiff::attend_backward", mutates_args=())
def attend_backward(
    of_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    density: Tensor,
    text_mask: Tensor | None,
    grid: list[int],
    lead: int,
    scale: float | None,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through the `torch` backend, which has them, one head of one item at a time: any other
    way keeps the scores of all heads. What is kept is chosen again, and counts as a constant."""
    by_torch = dataclasses.replace(unpack(rule), backend="torch", precision="full")
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for item in range(q.shape[0]):
        mask = None if text_mask is None else text_mask[item : item + 1]
        for head in range(q.shape[2]):
            at = (slice(item, item + 1), slice(None), slice(head, head + 1))
            with _recorded():
                one_q, one_k, one_v = parts = [x[at].detach().requires_grad_() for x in (q, k, v)]
                out, _ = attend(
                    one_q,
                    one_k,
                    one_v,
                    density[head : head + 1],
                    by_torch,
                    grid=LatentGrid(*grid),
                    lead=lead,
                    text_mask=mask,
                    scale=scale,
                )
                found = torch.autograd.grad(out, parts, of_out[at])
            for gradient, value in zip(gradients, found):
                gradient[at] = value
    return gradients


@attend_backward.register_fake
def _(of_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _remember(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.grid, ctx.lead, ctx.scale, ctx.rule = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, of_out: Tensor, of_stats: Tensor | None) -> tuple:
    gradients = attend_backward(of_out, *ctx.saved_tensors, ctx.grid, ctx.lead, ctx.scale, ctx.rule)
    return (*gradients, *[None] * 6)


attend_op.register_autograd(_backward, setup_context=_remember)
