"""enable, disable, report: the hook of draft attention into a diffusers pipeline.

A root hook on each transformer reads grid, CFG branch and step from the call and tells the attention layers whether to
be sparse; their processors send attention here. All state is on the hook and goes with it.
"""

from __future__ import annotations

import inspect
import re
import uuid
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor, nn

from draftdiff.core.grid import LatentGrid
from draftdiff.kernels.block_sparse import resolve
from draftdiff.kernels.crossover import dense_wins_above
from draftdiff.video import processors
from draftdiff.video.attention import STATS, attend, attend_op
from draftdiff.video.clock import Clock
from draftdiff.video.config import DraftAttentionConfig
from draftdiff.video.hunyuan15 import HunyuanVideo15Processor
from draftdiff.video.layouts import LAYOUTS, Layout, layout_for
from draftdiff.video.progress import Progress
from draftdiff.video.report import Forward, Report, TransformerReport

_HOOK = "draftdiff"
_MIN_TOKENS = {"cpu": 1024}
_MIN_TOKENS_ELSEWHERE = 8192


@dataclass(eq=False)
class _Layer:
    """One video self-attention: what it would be without us, and what the next call shall do."""

    index: int
    name: str
    module: nn.Module
    state: _State
    stock: Any = None  # the processor that ours stands for
    dense_backend: Any = None
    sparse: bool = False
    density: Tensor | None = None  # float64 [heads]
    share: float = 1.0  # its mean, known to the host
    stats: Tensor | None = None  # fp32, see attention.STATS


@dataclass(eq=False)
class _State:
    """What the layers of one transformer share during a call."""

    config: DraftAttentionConfig
    layer: _Layer | None = None  # the one that is calling
    grid: LatentGrid | None = None
    lead: int = 0
    text_first: bool = False
    exact_text: bool = True
    tile: tuple[int, int, int] | None = None
    block_size: int | None = None
    clock: Clock | None = None
    backend: str = ""
    forwards: list[Forward] = field(default_factory=list)


def _attend(
    layer: _Layer, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, scale: float | None, dense: Any
) -> Tensor:
    """One attention call of a hooked layer."""
    state = layer.state
    compiling = torch.compiler.is_compiling()
    if not layer.sparse:
        if compiling or state.clock is None:
            return dense()
        with state.clock.part("dense attention"):
            return dense()

    assert state.grid is not None and layer.density is not None and layer.stats is not None
    assert state.tile is not None and state.block_size is not None
    text = query.shape[1] - state.grid.tokens
    if text < 0 or key.shape != query.shape or (text > 0 and not state.exact_text):
        raise ValueError(
            f"draftdiff: {layer.name} was called with {query.shape[1]} queries and {key.shape[1]} keys, "
            f"which does not fit the grid {state.grid} of its model"
        )
    lead = text if state.text_first else state.lead
    text_mask = None
    if attn_mask is not None:
        if text == 0 or attn_mask.dtype != torch.bool or attn_mask.shape[1:3] != (1, 1):
            raise ValueError(
                f"draftdiff: {layer.name} was given a mask {tuple(attn_mask.shape)} of {attn_mask.dtype}; "
                "only one flag per text token, bool [batch, 1, 1, tokens], can be honoured"
            )
        valid = attn_mask[:, 0, 0].expand(query.shape[0], -1)
        text_mask = torch.cat([valid[:, :lead], valid[:, lead + state.grid.tokens :]], dim=1)
    config = state.config
    if query.shape[2] != len(layer.density) and config.budget.heads:
        raise ValueError("draftdiff: a budget per head cannot be used where processes share the heads (Ulysses)")
    density = layer.density[: query.shape[2]]
    if compiling:
        out, stats = attend_op(
            query,
            key,
            value,
            density,
            text_mask,
            list(state.grid.shape),
            lead,
            scale,
            config.selection,
            config.row_floor,
            config.tail,
            list(state.tile),
            state.block_size,
            config.backend,
        )
    else:
        state.backend = resolve(config.backend, query.device, query.dtype, query.shape[-1])
        worthwhile = config.min_tokens is not None or config.selection == "full"
        if not worthwhile and layer.share >= dense_wins_above(state.backend, query.device.type):
            layer.stats.fill_(1.0)
            assert state.clock is not None
            with state.clock.part("dense attention"):
                return dense()
        out, stats = attend(
            query,
            key,
            value,
            density,
            grid=state.grid,
            config=config,
            lead=lead,
            text_mask=text_mask,
            scale=scale,
            clock=state.clock,
        )
    layer.stats.copy_(stats)
    return out


class _DraftHook(ModelHook):
    """Before each forward of a transformer: find the step, and set the layers to dense or sparse."""

    _is_stateful = True

    def __init__(
        self,
        transformer: nn.Module,
        layout: Layout,
        config: DraftAttentionConfig,
        progress: Progress,
        pipeline: weakref.ref | None,
        num_steps: int,
    ) -> None:
        super().__init__()
        self.layout, self.config, self.progress = layout, config, progress
        self.pipeline, self.num_steps = pipeline, num_steps
        # diffusers writes the name of the CFG branch into it.
        self.branch = StateManager(BaseState)  # type: ignore[arg-type]
        self.signature = inspect.signature(type(transformer).forward)
        self.state = _State(config, text_first=layout.text == "first", exact_text=layout.text != "none")
        self.layers: list[_Layer] = []
        self.backend: AttentionBackendName | None = None
        self.run = -1
        self.start: Any = None
        self.installed: Any = None  # the transformer's forward with this hook

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        pattern = re.compile(self.layout.attention)
        found = [(name, m) for name, m in module.named_modules() if pattern.fullmatch(name)]
        if self.layout.route != "sdpa":
            self.backend = processors.register_backend(f"{_HOOK}_{uuid.uuid4().hex}", _attend, self.state)
        self.layers = [_Layer(index, name, attention, self.state) for index, (name, attention) in enumerate(found)]
        self._take_over()
        return module

    def _take_over(self) -> None:
        """Put our processors in place, also of those that were set, or given another backend, after us."""
        for layer in self.layers:
            current: Any = layer.module.processor
            if getattr(current, "draft_layer", None) is not layer:
                layer.stock, layer.dense_backend = current, processors.dense_backend(current)
                if self.backend is None:
                    mine = processors.through_catch(current, layer, _attend)
                else:
                    basis = HunyuanVideo15Processor() if self.layout.route == "own" else current
                    mine = processors.through_backend(basis, layer, self.state, self.backend)
                    mine._parallel_config = getattr(current, "_parallel_config", None)
                layer.module.processor = mine
            elif self.backend is not None and current._attention_backend is not self.backend:
                layer.dense_backend = processors.dense_backend(current)
                layer.stock._attention_backend = current._attention_backend
                current._attention_backend = self.backend

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        self._take_over()
        for layer in self.layers:
            layer.module.processor = layer.stock
        if self.backend is not None:
            processors.remove_backend(self.backend)
        return module

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.progress.reset()
        return module

    @torch.compiler.disable
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        bound = self.signature.bind(module, *args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        hidden_states: Tensor = arguments["hidden_states"]
        step = self.progress.observe(arguments["timestep"])
        if self.progress.run != self.run:
            self.run = self.progress.run
            self.state.forwards.clear()
            self.state.clock = Clock(hidden_states.device)
        if not bool(hidden_states.isfinite().all()):
            raise ValueError(f"draftdiff: the latents given to {type(module).__name__} hold NaN or inf at step {step}")

        self._take_over()
        state = self.state
        state.grid = self.layout.grid(module, arguments)
        steps = self._num_steps()
        dense_steps = self.config.dense_steps
        dense_until = round(dense_steps * steps) if isinstance(dense_steps, float) else dense_steps
        min_tokens = self.config.min_tokens
        if min_tokens is None:
            min_tokens = _MIN_TOKENS.get(hidden_states.device.type, _MIN_TOKENS_ELSEWHERE)
        sparse = state.grid is not None and state.grid.tokens >= min_tokens and step >= dense_until
        if sparse:
            assert state.grid is not None
            state.tile, state.block_size = self.config.tile_for(state.grid)
            state.lead = self.layout.lead(module, arguments) if self.layout.lead else 0
            attention: Any = self.layers[0].module
            heads = attention.heads if hasattr(attention, "heads") else attention.num_heads
            progress = (step - dense_until) / max(1, steps - dense_until)
            density = self.config.budget.density(len(self.layers), heads, min(progress, 0.999))
        for layer in self.layers:
            layer.sparse = sparse and not self.config.is_dense_layer(layer.index)
            if layer.sparse:
                if layer.stats is None or layer.stats.device != hidden_states.device:
                    layer.stats = torch.empty(len(STATS), device=hidden_states.device)
                layer.stats.fill_(-1.0)
                layer.density = density[layer.index].to(hidden_states.device)
                layer.share = float(density[layer.index].mean())
        branch = getattr(self.branch, "_context", None) or getattr(self.branch, "_current_context", None)
        name = getattr(branch, "name", branch) or ""
        state.forwards.append(Forward(step, name, sparse, [layer.index for layer in self.layers if layer.sparse]))
        assert state.clock is not None
        self.start = state.clock.now()
        return args, kwargs

    @torch.compiler.disable
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        state = self.state
        forward = state.forwards[-1]
        assert state.clock is not None
        state.clock.add("sparse forward" if forward.sparse else "dense forward", self.start)
        sparse_layers = [layer for layer in self.layers if layer.sparse]
        if sparse_layers:
            forward.stats = torch.stack([layer.stats for layer in sparse_layers if layer.stats is not None]).cpu()
            if bool(forward.stats.isnan().any()):
                name = sparse_layers[int(forward.stats.isnan().any(1).nonzero()[0])].name
                raise ValueError(f"draftdiff: query or key of {name} hold NaN at step {forward.step}")
        return output

    def _num_steps(self) -> int:
        context = getattr(self.branch, "_context", None)
        told = getattr(context, "num_inference_steps", None)
        if told:
            return told
        pipeline = self.pipeline() if self.pipeline is not None else None
        if pipeline is None:
            return self.num_steps
        counted = getattr(pipeline, "_num_timesteps", None)
        return counted or len(set(pipeline.scheduler.timesteps.tolist()))

    def report(self, module: nn.Module) -> TransformerReport:
        seconds = self.state.clock.seconds() if self.state.clock else {}
        return TransformerReport(
            transformer=type(module).__name__,
            layers=[layer.name for layer in self.layers],
            grid=self.state.grid.shape if self.state.grid else None,
            tile=self.state.tile,
            block_size=self.state.block_size,
            backend=self.state.backend or self.config.backend,
            forwards=list(self.state.forwards),
            seconds=seconds,
        )


def _unwrap(module: Any) -> Any:
    return getattr(module, "_orig_mod", module)


def _transformers(target: Any) -> list[nn.Module]:
    """The supported transformers of a pipeline, or the transformer itself. Raises ValueError if there is none."""
    if isinstance(target, nn.Module):
        layout_for(target)
        return [_unwrap(target)]
    if not hasattr(target, "components"):
        raise ValueError(f"expected a diffusers pipeline or transformer, got {type(target).__name__}")
    found = [
        component
        for component in map(_unwrap, target.components.values())
        if isinstance(component, nn.Module) and any(c.__name__ in LAYOUTS for c in type(component).__mro__)
    ]
    if not found:
        raise ValueError(
            f"{type(target).__name__} has no supported transformer; supported transformers: {', '.join(LAYOUTS)}"
        )
    return found


def _hook_of(transformer: nn.Module) -> _DraftHook | None:
    registry = getattr(transformer, "_diffusers_hook", None)
    hook = registry.get_hook(_HOOK) if registry is not None else None
    return hook if isinstance(hook, _DraftHook) else None


def enable(target: Any, config: DraftAttentionConfig | None = None, *, num_steps: int = 50) -> Any:
    """Make the video self-attentions of a pipeline, or of one transformer, draft-guided.

    target: a diffusers pipeline or transformer; changed in place. Enabling again applies the new config.
    config: see `DraftAttentionConfig`.  num_steps: length of a run that a share in `config.dense_steps` refers to, used
    only for a bare transformer; a pipeline tells its own. A bare transformer that is called over and over with one
    timestep stays in one run, whose report grows: `transformer._reset_stateful_cache()` begins the next.
    Returns target. Raises ValueError if no transformer is supported.
    """
    transformers = _transformers(target)
    config = config or DraftAttentionConfig()
    disable(target)
    pipeline = None if isinstance(target, nn.Module) else weakref.ref(target)
    progress = Progress()
    for transformer in transformers:
        layout = layout_for(transformer)
        hook = _DraftHook(transformer, layout, config, progress, pipeline, num_steps)
        registry = HookRegistry.check_if_exists_or_initialize(transformer)
        registry.register_hook(hook, _HOOK)
        hook.installed = transformer.forward
    return target


def disable(target: Any) -> Any:
    """Undo `enable`: processors, hooks and registrations are what they were. Does nothing where it was not enabled.

    Returns target.
    """
    for transformer in _transformers(target):
        hook = _hook_of(transformer)
        if hook is None:
            continue
        registry = HookRegistry.check_if_exists_or_initialize(transformer)
        last = registry._hook_order[-1] == _HOOK
        wrapped = transformer.forward if last and transformer.forward is not hook.installed else None
        registry.remove_hook(_HOOK, recurse=False)
        if wrapped is not None:
            # Others, such as accelerate's offload, hold our forward inside theirs: let it pass everything through.
            transformer.forward = wrapped
            hook.fn_ref.pre_forward = ModelHook().pre_forward
            hook.fn_ref.post_forward = ModelHook().post_forward
        elif not registry.hooks:
            # diffusers leaves an empty registry behind, and a forward on the instance that is the class's own.
            if getattr(transformer.forward, "__func__", None) is type(transformer).forward:
                transformer.__dict__.pop("forward", None)
            del transformer._diffusers_hook
    return target


def report(target: Any) -> Report:
    """What the last run did: dense and sparse steps, density, missed mass, time. Raises ValueError if not enabled."""
    hooks = [(transformer, _hook_of(transformer)) for transformer in _transformers(target)]
    reports = [hook.report(transformer) for transformer, hook in hooks if hook is not None]
    if not reports:
        raise ValueError(f"draftdiff is not enabled on this {type(target).__name__}")
    return Report(reports)
