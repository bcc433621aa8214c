"""What each layer, head and stretch of steps of a model would lose at each density, recorded in one dense run.

The run stays dense to the bit: beside its dense attention a sampled call is answered at every density of a ladder, and
the error goes through the head's part of the output projection, as it would into the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from draftdiff.attention.attend import STATS
from draftdiff.attention.rule import Rule
from draftdiff.core.budget import stretch_at
from draftdiff.errors import UserError
from draftdiff.hosts import diffusers as host
from draftdiff.hosts.dispatcher import Share
from draftdiff.video.calls import Over, sequence_of, sparse
from draftdiff.video.config import DraftAttentionConfig
from draftdiff.video.hook import Hook
from draftdiff.video.layouts import layout_for
from draftdiff.video.patch import disable, transformers_of, unwrapped
from draftdiff.video.tasks import Call, Layer, PerThread, Task

T = TypeVar("T")


@dataclass
class Sensitivity:
    """Recorded losses and times. ladder: densities.  tokens: shares of all keys that are read singly, each a choice.

    errors: of each sampled call, (step, layer, squared error float64 [tokens, rungs, heads]).
    seconds: of each, [tokens, rungs], the dense attention's beside it.  pairs: of each, share of all token pairs that
    are computed, [tokens, rungs].  steps: of the runs.
    """

    ladder: tuple[float, ...]
    tokens: tuple[float, ...]
    layers: int
    heads: int
    errors: list[tuple[int, int, Tensor]] = field(default_factory=list)
    seconds: list[tuple[Tensor, float]] = field(default_factory=list)
    pairs: list[Tensor] = field(default_factory=list)
    grid: tuple[int, int, int] | None = None
    steps: int = 0

    def loss(self, stretches: int) -> Tensor:
        """Squared error over the calls of each stretch of steps, float64 [tokens, rungs, stretches, layers, heads].

        A stretch without a sampled call has that of the nearest. Raises UserError if a layer was never sampled.
        """
        shape = (len(self.tokens), len(self.ladder), self.heads)
        total = torch.zeros(stretches, self.layers, *shape, dtype=torch.float64)
        calls = torch.zeros(stretches, self.layers)
        for step, layer, error in self.errors:
            place = stretch_at(step / self.steps, stretches)
            total[place, layer] += error.double().cpu()
            calls[place, layer] += 1
        for layer in range(self.layers):
            seen = calls[:, layer].nonzero().flatten()
            if not len(seen):
                raise UserError(
                    f"attention layer {layer} of the model was never sparse, so nothing can be tuned for it"
                )
            for place in range(stretches):
                nearest = seen[(seen - place).abs().argmin()]
                total[place, layer] = total[nearest, layer] / calls[nearest, layer].clamp(min=1)
                calls[place, layer] = 1 if place == nearest else calls[place, layer]
        return total.permute(2, 3, 0, 1, 4) * self.steps / stretches

    def costs(self) -> tuple[Tensor, float]:
        """Seconds of a layer's call, float64 [tokens, rungs], and of a dense one: the least of each, since another
        program on the machine only adds to it."""
        sparse = torch.stack([times for times, _ in self.seconds]).amin(0)
        return sparse.cummax(1).values, min(dense for _, dense in self.seconds)


@contextmanager
def recording(
    target: Any,
    config: DraftAttentionConfig,
    ladder: Sequence[float],
    tokens: Sequence[float],
    *,
    every: int = 3,
    num_steps: int = 50,
) -> Iterator[Sensitivity]:
    """While it lasts, runs of a pipeline or transformer are dense and fill what it yields.

    config: its rule, and its min_tokens.  ladder: densities.  tokens: shares of all keys to read singly.
    every: of so many forwards one is sampled.  num_steps: length of a run that no pipeline leads.
    draftdiff is disabled on the target before and after. Raises UserError for transformers of several shapes.
    """
    disable(target)
    models = [(outer, unwrapped(outer)) for outer in transformers_of(target)]
    open_to_all = replace(config, sparsity=0.5, tokens=0, dense_steps=0, dense_end=0, dense_layers=0, dense_above=1.0)
    rules = [replace(config.rule, single=float(share)) for share in tokens]
    shared, hooks = PerThread(), []
    found = Sensitivity(tuple(ladder), tuple(tokens), 0, 0)
    recorder = _Recorder(found, rules, every)
    try:
        for outer, model in models:
            hook = Hook(model, layout_for(model), open_to_all, recorder, shared, num_steps)
            shape = len(hook.layers), host.heads_of(hook.layers[0].module)
            if found.layers and shape != (found.layers, found.heads):
                raise UserError("transformers of different shapes in one pipeline cannot be tuned together")
            found.layers, found.heads = shape
            hook.install(model, outer if outer is not model else None)
            hooks.append(hook)
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    if not found.errors:
        reasons = {reason for hook in hooks for reason in hook.log.reasons}
        raise UserError(f"no attention call could be sparse: {'; '.join(sorted(reasons)) or 'none was made'}")


class _Recorder:
    """Answers attention calls densely, and every n-th forward's also at each density of the ladder."""

    def __init__(self, found: Sensitivity, rules: Sequence[Rule], every: int) -> None:
        self.found, self.rules, self.every = found, rules, every
        self.call: Call | None = None
        self.forwards = -1

    def __call__(
        self,
        layer: Layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: dict[str, Any],
        share: Share,
        dense: Callable[[], Tensor],
    ) -> Tensor:
        task: Task | None = layer.here.value
        is_self = layer.hook.layout.queries != "all" or query.shape[1] == key.shape[1]
        if task is None or task.density is None or not is_self or torch.compiler.is_compiling():
            return dense()
        if task.call is not self.call:
            self.call, self.forwards = task.call, self.forwards + 1
            self.found.steps = max(self.found.steps, task.call.forward.step + 1)
        over = sequence_of(layer, query, key, options, share, eager=True)
        if isinstance(over, str) or share.pieces > 1:
            task.call.log.reasons[over if isinstance(over, str) else "several processes share the heads"] += 1
            return dense()
        if self.forwards % self.every:
            return dense()
        out, seconds = _timed(dense, query.device)
        with torch.no_grad():
            self._sample(layer, task, (query, key, value), options["scale"], over, out, seconds)
        return out

    def _sample(
        self,
        layer: Layer,
        task: Task,
        tensors: tuple[Tensor, Tensor, Tensor],
        scale: float | None,
        over: Over,
        dense: Tensor,
        dense_seconds: float,
    ) -> None:
        assert task.density is not None and task.call.grid is not None
        found, project = self.found, host.projection_of(layer.module)
        gram = None if project is None else _gram(project.detach(), found.heads)
        errors, (times, pairs) = [], torch.zeros(2, len(self.rules), len(found.ladder), dtype=torch.float64)
        for row, rule in enumerate(self.rules):
            for column, density in enumerate(found.ladder):
                asked = replace(task, density=torch.full_like(task.density, density))

                def answer(rule: Rule = rule, asked: Task = asked) -> tuple[Tensor, Tensor]:
                    return sparse(layer, asked, rule, *tensors, scale, over, True)

                (out, stats), times[row, column] = _timed(answer, dense.device)
                pairs[row, column] = stats[STATS.index("density")]
                if task.keys is not None and task.keys.shape[1] == out.shape[1]:  # what padding asks nobody reads
                    out = out.where(task.keys[..., None, None], dense)
                errors.append(_error(out, dense, gram))
        grid = task.call.grid.shape
        found.grid = grid
        shape = (len(self.rules), len(found.ladder), found.heads)
        found.errors.append((task.call.forward.step, layer.index, torch.stack(errors).view(shape)))
        found.seconds.append((times, dense_seconds))
        found.pairs.append(pairs)


def _timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    wait = getattr(torch, device.type).synchronize if device.type != "cpu" else lambda: None
    wait()
    start = time.perf_counter()
    out = call()
    wait()
    return out, time.perf_counter() - start


def _gram(project: Tensor, heads: int) -> Tensor:
    """fp32 [heads, head_dim, head_dim]: a head's output o has the length o G o after the projection."""
    parts = project.float().unflatten(1, (heads, -1)).transpose(0, 1)
    return parts.transpose(1, 2) @ parts


def _error(out: Tensor, dense: Tensor, gram: Tensor | None) -> Tensor:
    """Squared error of each head, fp32 [heads]."""
    off = (out.float() - dense.float()).flatten(0, 1).transpose(0, 1)
    square = off.transpose(1, 2) @ off  # [heads, head_dim, head_dim]
    return square.diagonal(dim1=1, dim2=2).sum(-1) if gram is None else (square * gram).sum((1, 2)).clamp(min=0)
