"""Draft attention: the whole method on one page.

DraftAttention (arXiv 2505.14708) on any grid, with per-row budgets and a pooled tail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from draftdiff.attention import key_groups
from draftdiff.attention import own_frames as own
from draftdiff.attention.key_groups import KeyGroups
from draftdiff.attention.rule import Rule, unpack
from draftdiff.core import quality
from draftdiff.core.devices import without_autocast
from draftdiff.core.draft import Tail, draft_map, softmax_scale
from draftdiff.core.grid import LatentGrid, Tiling
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
    others: Sequence[tuple[int, LatentGrid]] = (),
    queries: Sequence[tuple[int, int]] = (),
    summed: Callable[[Tensor], Tensor] = lambda partial: partial,
    text_mask: Tensor | None = None,
    groups: KeyGroups | None = None,
    own_frames: int = 0,
    scale: float | None = None,
    part: Callable[[str], AbstractContextManager] = nullcontext,
) -> tuple[Tensor, Tensor]:
    """Attention that computes only the tiles which a low-resolution draft finds worth it.

    q, k, v: [batch, tokens, heads, head_dim] after normalisation and rotary embedding, in the model's order; k and v
    may have fewer heads, each for as many neighbouring heads of q. The grid's tokens stand after `lead` others.
    others: further grids, each with the position of its first token; all tokens in no grid are computed exactly.
    queries: where q's tokens stand among those of k, (start, stop) of each stretch in order, if q leaves some out;
    without it q may leave out the tokens before the grid where no token follows it.  summed: over the processes that
    have the other queries, so that all of a tile's choose together.
    density: kept share, float64 [heads].  text_mask: bool [batch, tokens in no grid], False for padding.
    groups: of all tokens of k, if the scores have a bias; the grids' are of group 0.
    own_frames: frames of a reference behind all other keys, each read by the queries of one of the grid's last frames
    alone; beside nothing but the grid.
    scale: 1/sqrt(head_dim) if None.  part: a context that is entered with the name of each part, to time it.
    Returns the output like q, and what was done, fp32 [2]: density over all token pairs, and the mass that the draft
    gives to the kept tiles; NaN if q or k hold a NaN. Raises ValueError for shapes that do not fit the grid.
    """
    check_tensors(q, k, v)
    if (sharing := q.shape[2] // k.shape[2]) > 1:  # a head of each group at a time: keys are never repeated
        given: dict[str, Any] = {"grid": grid, "lead": lead, "others": others, "queries": queries, "summed": summed}
        given |= {"text_mask": text_mask, "groups": groups, "own_frames": own_frames, "scale": scale, "part": part}
        alike = [slice(head, None, sharing) for head in range(sharing)]
        found = [attend(q[:, :, at], k, v, density[at], rule, **given) for at in alike]
        outs = torch.stack([out for out, _ in found], dim=3)
        return outs.flatten(2, 3), torch.stack([done for _, done in found]).mean(0)
    reference = own_frames * grid.height * grid.width
    (k, k_own), (v, v_own) = (x.tensor_split([k.shape[1] - reference], dim=1) for x in (k, v))
    video = grid.tokens + sum(other.tokens for _, other in others)
    text = k.shape[1] - video
    if text < 0:
        raise UserError(f"k has {k.shape[1]} tokens, fewer than the {video} of the grid {grid}")
    queries = _stretches(q, k, queries, all_before=text == lead and not others, grid=grid)
    tiling = rule.tiling(grid, text, lead, q.device, tuple(others))
    scale = softmax_scale(scale, q.shape[-1])
    places = asked = rows = None
    if queries:
        places, asked, drafted = _asked(tiling, queries)
        rows = drafted if rule.selection == "error" else None  # others deal a head's budget out over all rows
        q = q.new_zeros(k.shape[0], k.shape[1], *q.shape[2:]).index_copy_(1, places, q)
    with without_autocast(q.device):
        with part("draft"):
            q_mean, k_mean = summed(pool(q, tiling)), pool(k, tiling)
            q_mean = q_mean if rows is None else q_mean[:, :, rows]
            # The paper's map weighs all tiles alike, also those with fewer tokens.
            counts = None if rule.selection == "upstream" else tiling.counts[: tiling.video_tiles]
            probabilities = draft_map(q_mean, k_mean, scale=scale, counts=counts)
            tail = Tail(k_mean, pool(v, tiling)) if rule.tail else None
        with part("select"):
            tokens = taken = None
            single = rule.singles_of(video)
            in_tiles = (density - single / video).clamp(min=0).where(density < 1, density)
            # Where there is no tail nothing stands for what is skipped.
            means = tail or Tail(k_mean, torch.zeros_like(k_mean))
            if rule.selection == "error":
                kept = worst(errors(q_mean, k, v, means, tiling, scale=scale), in_tiles, rows)
            else:
                kept = select(rule.selection, probabilities, in_tiles)
            if single:
                tokens, taken = singles(q_mean, k, v, means, tiling, kept, scale=scale, tokens=single)
            mass = quality.drafted_mass(probabilities, kept).mean()
            if rows is not None:
                kept, taken = (x if x is None else _among_all(x, rows, tiling) for x in (kept, taken))
                tokens = None if tokens is None else _among_all(tokens, rows, tiling, absent=-1)
            keep = with_text(kept, tiling)
            done = quality.density(keep, tiling, tokens, taken, asked).mean()
            alone = reference * grid.height * grid.width / k.shape[1] ** 2  # pairs with own frames, over all others
            stats = torch.stack([(done + alone) / (1 + alone), mass])
        with part("kernel"):
            problem = Problem(q, k, v, keep, tiling, text_mask, tail, scale, tokens, taken, rule.precision, asked)
            if reference:
                out = own.attention(problem, k_own, v_own, backend=rule.backend)
            elif groups is not None:
                out = key_groups.attention(problem, groups, backend=rule.backend)
            else:
                out = block_sparse_attention(problem, backend=rule.backend)
    return out if places is None else out[:, places], stats


def _stretches(
    q: Tensor, k: Tensor, queries: Sequence[tuple[int, int]], *, all_before: bool, grid: LatentGrid
) -> tuple[tuple[int, int], ...]:
    """Where q's tokens stand among those of k, nothing if everywhere. all_before: no text follows a grid."""
    absent = k.shape[1] - q.shape[1]
    if queries:
        edges = [0, *(edge for stretch in queries for edge in stretch), k.shape[1]]
        if edges != sorted(edges) or sum(stop - start for start, stop in queries) != q.shape[1]:
            raise UserError(f"queries must be stretches of {q.shape[1]} in {k.shape[1]} tokens, got {list(queries)}")
    elif absent and (q.shape[1] != grid.tokens or not all_before):
        raise UserError(f"q has {q.shape[1]} tokens, needs the grid's {grid.tokens} or all {k.shape[1]} of k")
    elif absent:
        queries = [(absent, k.shape[1])]
    return tuple((start, stop) for start, stop in queries) if absent else ()


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # as tilings
def _asked(tiling: Tiling, queries: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of these stretches, the tiles that hold any of them, and those of the video among them, at least one:
    int64 [any] each."""
    places = torch.cat([torch.arange(start, stop) for start, stop in queries])
    there = torch.zeros(tiling.tokens + 1, dtype=torch.bool)  # -1 is the last place
    there[places] = True
    tiles = there[tiling.slots.cpu()].any(-1).nonzero()[:, 0]
    rows = tiles[tiles < tiling.video_tiles]
    rows = rows if len(rows) else torch.zeros(1, dtype=torch.long)
    return places.to(tiling.device), tiles.to(tiling.device), rows.to(tiling.device)


def _among_all(x: Tensor, rows: Tensor, tiling: Tiling, absent: int = 0) -> Tensor:
    """x [batch, heads, rows, any] where all video tiles have a row, `absent` in the others."""
    return x.new_full((*x.shape[:2], tiling.video_tiles, x.shape[3]), absent).index_copy_(2, rows, x)


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
    places: list[int],
    scale: float | None,
    rule: str,
    group: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend` as one node of a compiled or differentiated graph. places: `packed_places`.  rule: its `packed`.
    group, bias: `of` and `bias` of its groups."""
    where = _unpacked_places(places) | {"text_mask": text_mask, "groups": _groups(group, bias)}
    return attend(q, k, v, density, unpack(rule), **where, scale=scale)


def _groups(of: Tensor | None, bias: Tensor | None) -> KeyGroups | None:
    return None if of is None or bias is None else KeyGroups(of, bias)


def packed_places(
    grid: Sequence[int],
    lead: int = 0,
    others: Sequence[tuple[int, Sequence[int]]] = (),
    queries: Sequence[tuple[int, int]] = (),
    own_frames: int = 0,
) -> list[int]:
    """Where things stand in a sequence, as `attend` takes it, in whole numbers that a graph may hold: frames of a
    reference, how many grids there are, where each starts and its sizes, the first one's first, then the stretches of
    queries."""
    grids = [number for start, sizes in ((lead, grid), *others) for number in (start, *sizes)]
    return [own_frames, 1 + len(others), *grids, *(edge for stretch in queries for edge in stretch)]


def _unpacked_places(packed: list[int]) -> dict[str, Any]:
    own_frames, count, *numbers = packed
    grids, rest = numbers[: 4 * count], numbers[4 * count :]
    (lead, grid), *others = [(start, LatentGrid(*sizes)) for start, *sizes in zip(*[iter(grids)] * 4)]
    queries = list(zip(rest[::2], rest[1::2]))
    return {"grid": grid, "lead": lead, "others": others, "queries": queries, "own_frames": own_frames}


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
    places: list[int],
    scale: float | None,
    rule: str,
    group: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through the `torch` backend, which has them, one head of one item at a time: any other
    way keeps the scores of all heads. What is kept is chosen again, and counts as a constant."""
    by_torch = dataclasses.replace(unpack(rule), backend="torch", precision="full")
    gradients = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    sharing = q.shape[2] // k.shape[2]
    for item in range(q.shape[0]):
        mask = None if text_mask is None else text_mask[item : item + 1]
        groups = _groups(group, None if bias is None else bias.expand(q.shape[0], -1, -1)[item : item + 1])
        for head in range(q.shape[2]):
            own, shared = [(slice(item, item + 1), slice(None), slice(one, one + 1)) for one in (head, head // sharing)]
            with _recorded():
                one_q, one_k, one_v = parts = [
                    x[at].detach().requires_grad_() for x, at in ((q, own), (k, shared), (v, shared))
                ]
                out, _ = attend(
                    one_q,
                    one_k,
                    one_v,
                    density[head : head + 1],
                    by_torch,
                    **_unpacked_places(places),
                    text_mask=mask,
                    groups=groups,
                    scale=scale,
                )
                of_q, of_k, of_v = torch.autograd.grad(out, parts, of_out[own])
            gradients[0][own] = of_q
            gradients[1][shared] += of_k
            gradients[2][shared] += of_v
    return gradients


@attend_backward.register_fake
def _(of_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _remember(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.places, ctx.scale, ctx.rule, group, bias = inputs
    ctx.save_for_backward(*tensors, group, bias)


def _backward(ctx: Any, of_out: Tensor, of_stats: Tensor | None) -> tuple:
    *tensors, group, bias = ctx.saved_tensors
    gradients = attend_backward(of_out, *tensors, ctx.places, ctx.scale, ctx.rule, group, bias)
    return (*gradients, *[None] * 7)


attend_op.register_autograd(_backward, setup_context=_remember)
