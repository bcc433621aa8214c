"""What the node puts on a model of ComfyUI: a wrapper around each forward, with an override of attention inside it.

The wrapper puts the override on `optimized_attention_override` for the time of one forward and takes what it finds
there as the road of all dense calls: whoever sets or re-installs an override, and in whatever order, it is neither lost
nor in the way. What is known of a forward lives in its transformer_options and is gone after it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draftdiff.integrations.call import Places, sparse, why_dense
from draftdiff.integrations.comfyui.places import find
from draftdiff.integrations.comfyui.report import Forward, Log
from draftdiff.video.config import DraftAttentionConfig

KEY = "draftdiff"  # of what is ours in ComfyUI's dictionaries
_OVERRIDE = "optimized_attention_override"
_AFTER_HEADS = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")  # what may be given by position
_ROUNDING = 1e-6  # sigmas come in fp32
_MASKED = -1e4  # added to a score, it leaves nothing in any dtype


def apply(model: Any, config: DraftAttentionConfig, start_percent: float = 0.0, end_percent: float = 1.0) -> Any:
    """A clone of a ComfyUI model (a ModelPatcher) that runs draft attention between two percentages of the schedule.

    config: its dense_steps and dense_end are not looked at; min_tokens None is 0. Settings of an earlier node are
    replaced; the model that was given stays what it is.
    """
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    sampling = model.get_model_object("model_sampling")
    first, last = (float(sampling.percent_to_sigma(percent)) for percent in (start_percent, end_percent))
    patch = DraftAttention(config, first, last)
    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, KEY)
    clone.remove_callbacks_with_key(CallbacksMP.ON_PRE_RUN, KEY)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, patch)
    clone.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, patch.begin)
    return clone


def patch_of(model: Any) -> DraftAttention | None:
    """What `apply` put on a model or on one that it is a clone of, None if nothing."""
    from comfy.patcher_extension import WrappersMP

    found = model.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY)
    return found[-1] if found else None


@dataclass
class _State:
    """What is known of one forward. previous: the override that was there.  asked: whether it has come to attention.
    seen: its attention calls over the video."""

    model: Any
    arguments: Mapping[str, Any]
    previous: Callable[..., Tensor] | None
    done: Forward
    sparse: bool
    asked: bool = False
    seen: int = 0
    places: dict[int, Places | str | None] = field(default_factory=dict)
    mask: Tensor | None = None  # the last one that was read,
    flags: Tensor | str | None = None  # and as what


class DraftAttention:
    """The wrapper of a model's forward. sigmas: of the first and last sparse steps, falling."""

    def __init__(self, config: DraftAttentionConfig, first_sigma: float, last_sigma: float) -> None:
        self.config, self.first_sigma, self.last_sigma = config, first_sigma, last_sigma
        self.log = Log()

    def begin(self, model: Any = None) -> None:
        """A run begins: notes of the one before go."""
        self.log = Log()

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = _by_name(executor.original, args, kwargs)
        options = arguments.get("transformer_options")
        if options is None or "x" not in arguments:
            self.log.reasons[f"{type(executor.class_obj).__name__} was called without names for its arguments"] += 1
            return executor(*args, **kwargs)
        sigmas = options.get("sigmas")
        sigma = None if sigmas is None else float(sigmas.max())
        sparse = sigma is None or self.last_sigma * (1 - _ROUNDING) <= sigma <= self.first_sigma * (1 + _ROUNDING)
        state = _State(executor.class_obj, arguments, options.get(_OVERRIDE), Forward(sigma), sparse)
        with _set(options, {_OVERRIDE: self.attention, KEY: state}):
            out = executor(*args, **kwargs)
        if not state.asked:
            self.log.reasons["the whole forward, by a cache or another node's attention"] += 1
            return out
        if sparse and not state.seen and not any(isinstance(places, str) for places in state.places.values()):
            self.log.reasons[f"no attention over the video in {type(state.model).__name__}"] += 1
        self.log.forwards.append(state.done)
        return out

    @torch.compiler.disable
    def attention(
        self, func: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """ComfyUI's attention, q, k, v: [batch, tokens, heads * head_dim] or, with skip_reshape, [batch, heads, tokens,
        head_dim]; the output likewise, by skip_output_reshape."""
        options = kwargs.get("transformer_options") or {}
        state: _State | None = options.get(KEY)
        previous = None if state is None else state.previous
        given = dict(zip(_AFTER_HEADS, args)) | kwargs
        if state is not None:
            state.asked = True
        if state is not None and state.sparse and k.shape[-2] == q.shape[-2]:
            q4, k4, v4 = (_in_heads(x, q, heads, given.get("skip_reshape", False)) for x in (q, k, v))
            out = self._sparse(state, options, q4, k4, v4, given.get("mask"), given.get("scale"))
            if isinstance(out, Tensor):
                return out.transpose(1, 2) if given.get("skip_output_reshape") else out.flatten(2)
            if out is not None:
                self.log.reasons[out] += 1
        if previous is not None:
            return previous(func, q, k, v, heads, *args, **kwargs)
        return func(q, k, v, heads, *args, **kwargs)

    def _sparse(
        self,
        state: _State,
        options: Mapping[str, Any],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
    ) -> Tensor | str | None:
        """The output of a call, [batch, tokens, heads, head_dim], or None or the reason why it is left to others."""
        tokens, config = q.shape[1], self.config
        if tokens not in state.places:
            state.places[tokens] = find(state.model, state.arguments, options, tokens)
        places = state.places[tokens]
        if not isinstance(places, Places):
            return places
        index = state.seen
        state.seen += 1
        if options.get("block_index") is not None:
            index = options["block_index"]
            if options.get("block_type") == "single":
                index += len(getattr(state.model, "double_blocks", ()))
        if config.is_dense_layer(index):
            return None
        if (reason := why_dense(q, k, v, config, places)) is not None:
            return reason
        if mask is not state.mask:
            state.mask, state.flags = mask, _text_flags(mask, places.gaps(tokens), q)
        flags = state.flags
        if isinstance(flags, str):
            return flags
        done = sparse(q, k, v, config, places, flags=flags, scale=scale)
        if isinstance(done, str):
            return done
        self.log.grid, self.log.tile = places.grid, config.rule.tile_for(places.grid)[0]
        self.log.backend = done.backend
        state.done.add(done.stats)
        return done.out


def _in_heads(x: Tensor, q: Tensor, heads: int, in_heads: bool) -> Tensor:
    """A view [batch, tokens, heads, head_dim]. Keys may have fewer heads than q."""
    return x.transpose(1, 2) if in_heads else x.unflatten(-1, (-1, q.shape[-1] // heads))


def _by_name(function: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, also those that the function takes as **kwargs; none if they do not fit."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return {}
    named = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named


@contextmanager
def _set(options: dict[str, Any], values: Mapping[str, Any]) -> Iterator[None]:
    """While it lasts the dictionary has these values, and then those it had."""
    before = {name: options[name] for name in values if name in options}
    options.update(values)
    try:
        yield
    finally:
        for name in values:
            options.pop(name, None)
        options.update(before)


def _text_flags(mask: Tensor | None, gaps: list[tuple[int, int]], q: Tensor) -> Tensor | str | None:
    """Which tokens outside the grids may be read, bool [batch, tokens], from a mask of ComfyUI (flags, or numbers that
    are added to scores), None for all, or why it cannot be told so."""
    if mask is None:
        return None
    while mask.ndim < 4:  # as ComfyUI reads it: [tokens, tokens], with a batch, with heads
        mask = mask.unsqueeze(0 if mask.ndim == 2 else 1) if mask.ndim > 1 else mask[None]
    if mask.ndim > 4 or mask.shape[1:] != (1, 1, q.shape[1]):
        return "a mask over pairs of tokens"
    row = mask[:, 0, 0]
    readable = row if row.dtype == torch.bool else row == 0
    text = torch.cat([torch.arange(start, stop, device=row.device) for start, stop in gaps])
    video = torch.ones(row.shape[1], dtype=torch.bool, device=row.device)
    video[text] = False
    plain = (readable | ~video).all()
    if row.dtype != torch.bool:
        plain &= (readable | (row <= _MASKED)).all()
    if not plain:  # one wait for the device, for all layers that share the mask
        return "a mask that is not one flag per text token"
    return readable[:, text].expand(q.shape[0], -1) if len(text) else None
