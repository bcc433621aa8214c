"""What is known of one forward of a transformer, and how its attention layers come to know it.

A call's state lives for that call, in that thread: a pre-hook of the module makes it and hands each layer its task, a
post-hook takes the tasks away, also after an error. A layer reached outside such a call has no task and is dense.
Module hooks run around whatever `forward` is at that moment, so a host may replace, wrap or restore it.
"""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from draftdiff.attention.attend import STATS, compute_dtype
from draftdiff.attention.key_groups import KeyGroups
from draftdiff.core.devices import exact_dtype
from draftdiff.core.grid import LatentGrid
from draftdiff.errors import UserError
from draftdiff.hosts import diffusers as host
from draftdiff.hosts.dispatcher import Attend, backend_for, release_backend
from draftdiff.hosts.stand_in import stand_in
from draftdiff.kernels.block_sparse import resolve
from draftdiff.kernels.crossover import dense_wins_above
from draftdiff.video.clock import Clock
from draftdiff.video.config import DraftAttentionConfig
from draftdiff.video.hunyuan15 import HunyuanVideo15Processor
from draftdiff.video.layouts import Layout
from draftdiff.video.report import Forward, Log
from draftdiff.video.steps import Run, noise_of
from draftdiff.video.tasks import Call, Layer, PerThread, Task, attentions_of

# Tokens below which a sparse call does not pay. On a GPU a sparse layer takes about ten launches more than a dense one,
# some 0.1 ms; at 4,096 tokens of 24 heads of 128 dense attention takes about 0.4 ms on an H100, three quarters of which
# can be saved. (By count of operations; no GPU was measured.)
_MIN_TOKENS = {"cpu": 1024}
_MIN_TOKENS_ELSEWHERE = 4096


class Hook:
    """Before each forward: find step and grid, and give the layers their tasks. After it: take them back, keep notes.

    attend: answers an attention call of a layer (`patch.attention_call`).  shared: what the hooks of one `enable` share
    of a run that no pipeline leads.  num_steps: length of such a run.
    """

    def __init__(
        self,
        transformer: nn.Module,
        layout: Layout,
        config: DraftAttentionConfig,
        attend: Attend,
        shared: PerThread,
        num_steps: int,
    ) -> None:
        self.layout, self.config, self.shared, self.num_steps = layout, config, shared, num_steps
        self.here = PerThread()
        self.log = Log()
        self.warned = False
        self.backend: Any = None
        found = attentions_of(transformer, layout.attention)
        self.layers = [Layer(index, name, module, self, attend) for index, (name, module) in enumerate(found)]
        self.handles: list[Any] = []

    def install(self, model: nn.Module, wrapper: nn.Module | None) -> None:
        """Hook a transformer, and a wrapper of `torch.compile` around it: there the hook can run outside the graph."""
        found: list[tuple[nn.Module, Callable, Callable]] = [(model, self.before, self.after)]
        if wrapper is not None:
            found.append((wrapper, self.before_wrapped, self.after_wrapped))
        for module, before, after in found:
            self.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self.handles.append(module.register_forward_hook(after, always_call=True))
        self.take_over()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.take_over()
        for layer in self.layers:
            layer.module.processor = layer.stock
        release_backend(self)

    def take_over(self) -> None:
        """Put our processors in place, also of those that were set after us."""
        self.backend = backend_for(self)
        for layer in self.layers:
            current: Any = layer.module.processor
            if getattr(current, "draft_layer", None) is not layer:
                layer.stock = current
                code = HunyuanVideo15Processor if self.layout.route == "own" else None
                layer.module.processor = stand_in(current, layer, code, self.layout.route)

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if self.here.value is None or not self.here.value.wrapped:
            self._enter(model, args, kwargs, False)
        return self._replaced(model, args, kwargs)

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        if self.here.value is not None and not self.here.value.wrapped:
            self._leave(model, output)

    def before_wrapped(self, wrapper: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        self._enter(wrapper._orig_mod, args, kwargs, True)
        return self._replaced(wrapper._orig_mod, args, kwargs)

    def after_wrapped(self, wrapper: Any, args: Any, output: Any) -> None:
        if self.here.value is not None:
            self._leave(wrapper._orig_mod, output)

    @torch.compiler.disable(
        reason="draftdiff reads the timestep before each forward, which no full graph can: for fullgraph=True compile "
        "the repeated blocks, or call draftdiff.enable after torch.compile"
    )
    def _enter(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], wrapped: bool) -> None:
        if (broken_off := self.here.value) is not None:  # by Ctrl-C, which PyTorch tells no hook of
            broken_off.leaves.close()
        self.take_over()
        arguments = _arguments(model, args, kwargs, self.layout.inputs)
        if arguments is None:
            name = f"{type(model).__name__}.forward"
            self.log = Log()
            self.log.reasons[f"{name} was replaced and called without names for its arguments"] += 1
            self._warn(
                f"{name} was replaced by one that does not name its arguments: call it with names to make it sparse"
            )
            return
        latents, timestep = (arguments[name] for name in self.layout.inputs)
        hidden_states = _tensors(latents)[0]
        run, scheduler, told = self._run(timestep)
        if self not in run.logs:
            run.logs[self] = self.log = Log(Clock(hidden_states.device))
        log = run.logs[self]
        passage, step, steps = run.place(scheduler, timestep, told)
        grid = self.layout.grid(model, arguments)
        call = Call(wrapped, log, Forward(passage, step), None if grid is None else LatentGrid.of(grid))
        tasks = [Task(call) for _ in self.layers]
        sparse = self.config.sparse_steps(steps)
        if call.grid is None:
            log.reasons["the grid of a call's tokens cannot be told (see the model's note)"] += 1
        elif self._has_enough(call.grid, hidden_states.device, log) and step in sparse:
            self._draw_up(call, tasks, model, arguments, progress=sparse.index(step) / len(sparse))
        log.forwards.append(call.forward)
        if torch.is_grad_enabled():
            again = host.checkpoints_through(model, lambda block: self._resumed(call, tasks, block))
            call.leaves.enter_context(again)
        call.leaves.enter_context(self._active(call, tasks))
        call.start = log.clock.now()

    def _replaced(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """The arguments of a forward with sparse layers, if it asks for a sparse attention of the model's own."""
        names = self.layout.replaces
        if not names or self.here.value is None or not self.here.value.forward.layers:
            return None
        places = list(inspect.signature(type(model).forward).parameters)[1:]
        kept = tuple(None if name in names else value for name, value in zip(places, args))
        return kept, kwargs | {name: None for name in names if name in kwargs}

    def _draw_up(self, call: Call, tasks: list[Task], model: nn.Module, arguments: _Arguments, progress: float) -> None:
        """Turn the tasks of the layers that shall be sparse into sparse ones."""
        assert call.grid is not None
        layout, latents = self.layout, _tensors(arguments[self.layout.inputs[0]])
        device, log = latents[0].device, call.log
        lead = layout.lead(model, arguments) if layout.lead else 0
        keys = layout.keys(model, arguments) if layout.keys else None
        others = layout.others(model, arguments) if layout.others else []
        groups, mask = None, layout.mask(model, arguments) if layout.mask else None
        if mask is not None:
            first = mask.shape[-1] - call.grid.tokens if layout.text == "first" else lead
            groups = KeyGroups.found_in(mask, first)
            if groups is None or not groups.is_first(first, call.grid):
                log.reasons["a mask that adds more numbers than one for each of a few groups of keys"] += 1
                return
            others = [(start, grid) for start, grid in others if groups.is_first(start, grid)]
            log.groups = max(log.groups, groups.bias.shape[-1])
        log.grid = call.grid.shape
        log.tile, log.block_size = self.config.rule.tile_for(call.grid)
        visual = call.grid.tokens + sum(grid.tokens for _, grid in others if grid.tokens >= log.block_size)
        log.selection, log.tokens = self.config.selection, self.config.rule.singles_of(visual)
        density = self.config.budget.density(len(tasks), host.heads_of(self.layers[0].module), progress)
        shares = density.mean(1).tolist()
        limit = self._dense_above(latents[0], log)
        for layer in self.layers:
            if self.config.is_dense_layer(layer.index) or shares[layer.index] >= limit:
                continue
            if host.is_skipped(layer.module):
                log.reasons["a layer-skip hook of diffusers replaces the attention"] += 1
                continue
            call.forward.layers.append(layer.index)
        call.finite = torch.stack([x.isfinite().all() for x in latents]).all()
        call.stats = torch.full((len(call.forward.layers), len(STATS)), -1.0, device=device)
        places = [number for start, grid in others for number in (*grid.shape, start)]
        causal = layout.causal(model, arguments) if layout.causal else 0
        own = layout.own_frames(model, arguments) if layout.own_frames else 0
        shape = torch.empty(*call.grid.shape, lead, causal, own, *places, 0, device=device)
        shares_there = density.to(device, exact_dtype(device))
        for row, index in enumerate(call.forward.layers):
            task = tasks[index]
            task.density, task.stats, task.shape, task.keys = shares_there[index], call.stats[row], shape, keys
            task.groups, task.block_size = groups, log.block_size

    def _dense_above(self, hidden_states: Tensor, log: Log) -> float:
        """Density from which a layer is left to dense attention."""
        config, device = self.config, hidden_states.device
        log.backend = config.backend
        if log.backend == "auto":
            log.backend = resolve("auto", device, compute_dtype(hidden_states), host.head_dim_of(self.layers[0].module))
        if config.selection == "full":
            return math.inf
        return dense_wins_above(log.backend, device.type) if config.dense_above is None else config.dense_above

    def _has_enough(self, grid: LatentGrid, device: torch.device, log: Log) -> bool:
        floor = self.config.min_tokens
        if floor is None:
            floor = _MIN_TOKENS.get(device.type, _MIN_TOKENS_ELSEWHERE)
        if grid.tokens >= floor:
            return True
        log.grid = grid.shape
        reason = f"{grid.tokens} video tokens are fewer than min_tokens, here {floor}"
        log.reasons[reason] += 1
        self._warn(f"{reason}: all stays dense; with min_tokens=0 it would not")
        return False

    def _run(self, timestep: Tensor) -> tuple[Run, Any, int | None]:
        """The run that a call belongs to, the scheduler that leads it and the steps that its pipeline tells."""
        pipelines = host.running_pipelines()
        if not pipelines:
            key, run = self.shared.value or (None, None)
            if run is None or key is not None or run.now.turns_back(noise_of(timestep)):
                self.shared.value = None, (run := Run())
            return run, None, self.num_steps
        frame, pipeline = pipelines[-1][0], pipelines[0][1]
        told = getattr(pipeline, "_num_timesteps", None), getattr(pipeline, "scheduler", None)
        if isinstance(frame.f_trace, Run):
            run = frame.f_trace
        elif frame.f_trace is None and sys.gettrace() is None:
            run = frame.f_trace = Run()
        else:  # a debugger has the place: hold the frame itself
            key, run = self.shared.value or (None, None)
            if run is None or key is not frame:
                self.shared.value = frame, (run := Run())
        return run, told[1], told[0]

    @torch.compiler.disable
    def _leave(self, model: nn.Module, output: Any) -> None:
        call: Call = self.here.value
        call.leaves.close()
        forward = call.forward
        call.log.clock.add("sparse forward" if forward.layers else "dense forward", call.start)
        if output is None or call.finite is None:  # an error is on its way, or there is nothing to read
            return
        *stats, finite = torch.cat([call.stats.flatten(), call.finite[None]]).cpu()
        where = f"at step {forward.step}"
        if not finite:
            raise UserError(f"draftdiff: the latents given to {type(model).__name__} hold NaN or inf {where}")
        forward.stats = torch.stack(stats).view(-1, len(STATS)) if stats else torch.empty(0, len(STATS))
        forward.ran = ~(forward.stats[:, 0] < 0)
        for index in forward.stats.isnan().any(1).nonzero()[:1].flatten().tolist():
            name = self.layers[forward.layers[index]].name
            raise UserError(f"draftdiff: query or key of {name} hold NaN {where}")

    @contextmanager
    def _active(self, call: Call, tasks: list[Task]) -> Iterator[None]:
        """While it lasts, this thread's layers have these tasks."""
        self.here.value = call
        for layer, task in zip(self.layers, tasks):
            layer.here.value = task
        try:
            yield
        finally:
            self.here.value = None
            for layer in self.layers:
                layer.here.value = None

    def _resumed(self, call: Call, tasks: list[Task], block: Callable) -> Callable:
        """A block that, run again when its call is over, does as it did in it: for gradient checkpointing."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with nullcontext() if self.here.value is call else self._active(call, tasks):
                return block(*args, **kwargs)

        return run

    def _warn(self, text: str) -> None:
        if not self.warned:
            self.warned = True
            warnings.warn(f"draftdiff: {text}", stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which begin without notes."""
        return self.__dict__ | {"log": Log(), "warned": False}


def _tensors(latents: Any) -> list[Tensor]:
    """Latents, a tensor or lists of them, as one list."""
    return [latents] if isinstance(latents, Tensor) else [x for part in latents for x in _tensors(part)]


class _Arguments(dict):
    """Arguments by name; those that were not given are None, as all are that may be left out."""

    def __missing__(self, name: str) -> None:
        return None


def _arguments(model: nn.Module, args: tuple, kwargs: dict[str, Any], needed: tuple[str, ...]) -> _Arguments | None:
    """The arguments of a forward by name, None where those needed cannot be told: a host may have replaced the
    forward."""
    if args:
        signature = inspect.signature(type(model).forward)
        if needed[0] not in signature.parameters:
            return None
        kwargs = signature.bind(model, *args, **kwargs).arguments
    return _Arguments(kwargs) if set(needed) <= set(kwargs) else None
