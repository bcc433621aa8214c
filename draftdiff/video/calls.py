"""What answers an attention call of a hooked layer: draft attention where its task says so and nothing speaks against
it, else what would have been."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from draftdiff.attention.attend import attend, attend_op, compute_dtype, needs_gradient, packed_places
from draftdiff.attention.key_groups import KeyGroups
from draftdiff.attention.rule import Rule
from draftdiff.core.grid import LatentGrid
from draftdiff.hosts import diffusers as host
from draftdiff.hosts.dispatcher import Share
from draftdiff.kernels.block_sparse import resolve
from draftdiff.video.tasks import Layer, Task

_FILLED = 128  # tokens of a block of FlexAttention


def attention_call(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: dict[str, Any],
    share: Share,
    dense: Callable[[], Tensor],
) -> Tensor:
    """One attention call of a hooked layer: sparse if this call of its transformer says so and nothing speaks against.

    query, key, value: [batch, tokens, heads, head_dim].  options: mask, scale, dropout, causal, gqa.
    share: what this process has of the call.
    """
    task: Task | None = layer.here.value
    eager = not torch.compiler.is_compiling()
    if task is None:
        if eager:
            layer.hook.log.reasons["attention was reached outside a forward that draftdiff saw"] += 1
        return dense()
    if task.density is None or not (share.count < share.pieces or _is_over_grid(layer, task, query, key)):
        return _dense(task, dense, eager)
    found = sequence_of(layer, query, key, options, share, eager)
    if isinstance(found, str):
        assert task.stats is not None
        task.stats.fill_(1.0)
        if eager:
            task.call.log.reasons[found] += 1
        return _dense(task, dense, eager)
    out, stats = sparse(layer, task, layer.hook.config.rule, query, key, value, options["scale"], found, eager)
    assert task.stats is not None
    task.stats.copy_(stats.detach())
    return out


def _is_over_grid(layer: Layer, task: Task, query: Tensor, key: Tensor) -> bool:
    """Adapters, and pathways for other tokens than those of the grid, send other calls the same way."""
    assert task.shape is not None
    if layer.hook.layout.queries == "all":
        return query.shape[1] == key.shape[1]
    frames, height, width = task.shape.shape[:3]
    return key.shape[1] >= frames * height * width


def _dense(task: Task, dense: Callable[[], Tensor], eager: bool) -> Tensor:
    if not eager:
        return dense()
    with task.call.log.clock.part("dense attention"):
        return dense()


@dataclass(frozen=True, eq=False)
class Over:
    """Where the tokens of a call stand, in the order of its model.

    grid, lead, others, queries, text_mask, groups, own_frames: as `attend` takes them.
    causal: frames of a block that sees no later ones, 0 if all see all.  share: what this process has of it.
    pieces: tokens of each stream's pieces as processes brought them, those of the queries and those of the keys, if
    they are to be put in order first.
    """

    grid: list[int]
    lead: int
    others: list[tuple[int, list[int]]]
    queries: list[tuple[int, int]]
    text_mask: Tensor | None
    groups: KeyGroups | None
    own_frames: int
    causal: int
    share: Share
    pieces: tuple[list[tuple[int, int]], list[tuple[int, int]]] | None


def sequence_of(
    layer: Layer, query: Tensor, key: Tensor, options: dict[str, Any], share: Share, eager: bool
) -> Over | str:
    """What a call of a layer with a sparse task is over, or why it has to be dense."""
    task: Task = layer.here.value
    assert task.shape is not None
    frames, height, width, lead, causal, own_frames, *rest = task.shape.shape[:-1]
    others = [(start, sizes) for *sizes, start in zip(*[iter(rest)] * 4)]
    tokens, own, layout = key.shape[1], frames * height * width, layer.hook.layout
    mask = None if layout.route == "flex" else options["mask"]
    if tokens == own:  # a block for the picture alone
        others = []
    text = tokens - own - sum(f * h * w for _, (f, h, w) in others)
    if text < 0 or (text > 0 and layout.text == "none"):
        return "a call's tokens do not fit the grid of its model"
    if options["dropout"] or options["causal"]:
        return "causal attention or dropout"
    if query.shape[2] != key.shape[2] and not options["gqa"]:
        return "fewer key heads than query heads"
    if task.groups is not None and len(task.groups.of) != tokens:
        return "a call of other tokens than the mask is for"
    if causal and (share.count < share.pieces or text > 0 or others):
        return "causal blocks of frames beside other tokens or over ring processes"
    if share.count < share.pieces and not eager:
        return "ring context parallelism in a compiled graph"
    if eager and host.is_watched():
        return "a torch function mode watches attention (perturbed-attention guidance does)"
    grid = [frames, height, width]
    if own_frames:
        filled = [-(-count * height * width // _FILLED) * _FILLED for count in (frames, own_frames)]
        if share.pieces > 1 or [query.shape[1], tokens - query.shape[1]] != filled:
            return "a call's tokens do not fit the grid of its model"
        return Over(grid, 0, [], [], None, None, own_frames, 0, share, None)
    if layout.text == "first":
        lead = tokens - own
    elif (absent := lead - sum(f * h * w for at, (f, h, w) in others if at < lead) - text) > 0:
        lead, others = lead - absent, [(at - absent, sizes) for at, sizes in others]

    queries, pieces = [], None
    if share.pieces > 1:
        text_first = layout.text == "first" or (layout.text == "around" and lead > 0)
        streams = [tokens] if layout.one_stream or text == 0 else [lead, tokens - lead]
        if len(streams) > 1 and not text_first:
            streams = [tokens - text, text]
        cut = [share.sizes(stream) for stream in streams]
        mine = slice(share.first, share.first + share.count)
        if share.count < share.pieces:
            for at, sizes in enumerate(cut):
                start = sum(streams[:at]) + sum(sizes[: share.first])
                queries.append((start, start + sum(sizes[mine])))
        if len(streams) > 1:
            pieces = list(zip(*(sizes[mine] for sizes in cut))), list(zip(*cut))
    elif (asked := query.shape[1]) < own:
        return "a call that does not ask for the whole grid"
    elif asked < tokens:
        in_front = {"first": asked, "last": 0, "ends": asked - own}[layout.queries]
        queries = [(0, in_front), (tokens - asked + in_front, tokens)]
        queries = [(start, stop) for start, stop in queries if start < stop]

    others = [(at, sizes) for at, sizes in others if sizes[0] * sizes[1] * sizes[2] >= task.block_size]
    text = tokens - own - sum(f * h * w for _, (f, h, w) in others)

    text_mask = task.keys
    if text_mask is None and task.groups is None and mask is not None and not causal:
        if text == 0 or mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:3] != (1, 1):
            return "a mask that is not one flag per text token"
        text_mask = mask[:, 0, 0].expand(query.shape[0], -1)
        text_mask = text_mask if pieces is None else _in_order(text_mask, pieces[1])
    if text_mask is not None:
        grids = sorted([(lead, lead + own), *((at, at + f * h * w) for at, (f, h, w) in others)])
        edges = [0, *(edge for grid in grids for edge in grid), tokens]
        gaps = [text_mask[:, start:stop] for start, stop in zip(edges[::2], edges[1::2])]
        text_mask = torch.cat(gaps, dim=1) if text else None
    return Over(grid, lead, others, queries, text_mask, task.groups, 0, causal, share, pieces)


def sparse(
    layer: Layer,
    task: Task,
    rule: Rule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    over: Over,
    eager: bool,
) -> tuple[Tensor, Tensor]:
    """Draft attention of a layer's call by this rule, at the density of its task; returns as `attend` does."""
    assert task.density is not None
    if over.causal:

        def attended(q: Tensor, k: Tensor, v: Tensor, seen: Over) -> tuple[Tensor, Tensor]:
            return sparse(layer, task, rule, q, k, v, scale, seen, eager)

        return _by_blocks(attended, query, key, value, over)
    dtype = compute_dtype(query)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    filled = query.shape[1]
    if over.own_frames:
        frames, height, width = over.grid
        query, reference = query[:, : frames * height * width], over.own_frames * height * width
        key, value = (torch.cat([x[:, : query.shape[1]], x[:, filled : filled + reference]], 1) for x in (key, value))
    if over.pieces is not None:
        query, (key, value) = _in_order(query, over.pieces[0]), (_in_order(x, over.pieces[1]) for x in (key, value))
    first_head = over.share.heads_from
    density = task.density[first_head : first_head + query.shape[2]].to(query.device)
    if not eager or needs_gradient(query, key, value):
        places = packed_places(over.grid, over.lead, over.others, over.queries, over.own_frames)
        groups = (None, None) if over.groups is None else (over.groups.of, over.groups.bias)
        out, stats = attend_op(query, key, value, density, over.text_mask, places, scale, rule.packed, *groups)
    else:
        log = task.call.log
        log.backend = resolve(rule.backend, query.device, dtype, query.shape[-1], rule.precision)
        out, stats = attend(
            query,
            key,
            value,
            density,
            rule,
            grid=LatentGrid(*over.grid),
            lead=over.lead,
            others=[(start, LatentGrid(*sizes)) for start, sizes in over.others],
            queries=over.queries,
            summed=over.share.summed,
            text_mask=over.text_mask,
            groups=over.groups,
            own_frames=over.own_frames,
            scale=scale,
            part=log.clock.part,
        )
    if over.own_frames:
        out = F.pad(out, (0, 0, 0, 0, 0, filled - out.shape[1]))
    return (out if over.pieces is None else _as_brought(out, over.pieces[0])), stats


def _by_blocks(
    attended: Callable[[Tensor, Tensor, Tensor, Over], tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    over: Over,
) -> tuple[Tensor, Tensor]:
    """Each causal block of frames as a call of its own over all frames up to its last one."""
    frames, height, width = over.grid
    outs, done, pairs = [], [], []
    for start in range(0, frames, over.causal):
        stop = min(start + over.causal, frames)
        first, last = start * height * width, stop * height * width
        queries = [(first, last)] if start else []
        seen = Over([stop, height, width], 0, [], queries, None, None, 0, 0, over.share, None)
        out, stats = attended(query[:, first:last], key[:, :last], value[:, :last], seen)
        outs.append(out)
        done.append(stats)
        pairs.append((last - first) * last)
    weights = torch.tensor(pairs, device=query.device, dtype=torch.float32)
    return torch.cat(outs, dim=1), (torch.stack(done) * (weights / weights.sum())[:, None]).sum(0)


def _in_order(x: Tensor, pieces: list[tuple[int, int]]) -> Tensor:
    """Tokens [batch, tokens, ...] that came as a piece of each of two streams from each process: one stream, then the
    other."""
    parts = x.split([size for pair in pieces for size in pair], dim=1)
    return torch.cat([*parts[::2], *parts[1::2]], dim=1)


def _as_brought(x: Tensor, pieces: list[tuple[int, int]]) -> Tensor:
    """The reverse of `_in_order`."""
    parts = x.split([pair[stream] for stream in (0, 1) for pair in pieces], dim=1)
    count = len(pieces)
    return torch.cat([part for pair in zip(parts[:count], parts[count:]) for part in pair], dim=1)
