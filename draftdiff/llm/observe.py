"""Watch a transformers model's attention from outside: under a temporary attention name, gone again on exit."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from draftdiff.core.importance import attention_mass
from draftdiff.hosts.transformers import (
    attention_name,
    attention_of,
    dispatches_attention,
    forget_attention,
    set_attention_name,
)
from draftdiff.llm.checks import require


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention, right after its keys and values went into the cache.

    query: [batch, heads, queries, head_dim].  key, value: [batch, key heads, keys, head_dim], rotated, the queries' own
    keys last.  scale: of the scores.  mask: the model's, for this call; see `readable`.  softcap: of the scores.
    sliding_window: keys that a query reads, itself included.  sinks: scores [heads] of a key beyond all others.
    """

    layer: int
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    mask: Any = None
    softcap: float | None = None
    sliding_window: int | None = None
    sinks: Tensor | None = None

    def readable(self, rows: int) -> Tensor:
        """Which keys the last `rows` queries read, bool [batch or 1, 1, rows, keys].

        Raises ValueError for a mask that is no tensor (flex_attention's).
        """
        keys = self.key.shape[2]
        require(
            self.mask is None or isinstance(self.mask, Tensor),
            f"attention masks must be tensors, got {type(self.mask).__name__}; load the model with "
            "attn_implementation 'sdpa' or 'eager'",
        )
        if self.mask is not None and self.mask.ndim == 4:
            mask = self.mask[:, :1, -rows:, :keys]
            return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        column = torch.arange(keys, device=self.key.device)
        position = column[keys - rows :, None]
        allowed = column <= position
        if self.sliding_window is not None:
            allowed &= column > position - self.sliding_window
        allowed = allowed[None, None]
        return allowed if self.mask is None else allowed & self.mask[:, None, None, -keys:].bool()

    def mass(self, rows: int, *, weights: Tensor | None = None, reduce: str = "sum") -> Tensor:
        """Attention that the last `rows` queries give to each key, fp32 [batch, key heads, keys].

        weights, reduce: see core.importance.attention_mass.
        """
        readable = self.readable(rows)
        groups = self.query[:, :, -rows:].unflatten(1, (self.key.shape[1], -1))
        sinks = None if self.sinks is None else self.sinks.unflatten(0, groups.shape[1:3])
        heads = [
            attention_mass(
                groups[:, head],
                self.key[:, head, None],
                scale=self.scale,
                softcap=self.softcap,
                sinks=None if sinks is None else sinks[head],
                mask=readable,
                weights=weights,
                reduce=reduce,
            )
            for head in range(self.key.shape[1])  # all heads' fp32 scores at once would outgrow the keys themselves
        ]
        return torch.cat(heads, dim=1)


Observer = Callable[[AttentionCall], "Tensor | None"]
_NUMBERS = count()


class _Turns:
    """Kept on a model, whose threads observe it one at a time: the name of an attention is the model's, not a thread's.

    left: names that another thread used, and may be about to look up, when their context ended; they go with the model
    at the latest. A copy starts anew.
    """

    def __init__(self) -> None:
        self.lock, self.left = threading.RLock(), set[str]()
        weakref.finalize(self, _forget, self.left)

    def __reduce__(self) -> tuple[type[_Turns], tuple[()]]:
        return _Turns, ()


@contextmanager
def observing(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Call observer before each attention of the model while the context lasts.

    What it returns, [batch, queries, heads, head_dim], stands in for the attention; None leaves it to the model's own
    implementation, with outputs bit for bit as without an observer; so it is for other threads that use the model
    meanwhile, while those that would observe it too wait for their turn. On exit, also by an exception, the
    implementations are what they were and the temporary name is in no registry (where another thread used it, the next
    context of the model takes it out, or the model's end). Contexts may be nested.
    Raises ValueError for a model that does not take its attention from transformers' AttentionInterface.
    """
    require(
        dispatches_attention(model),
        f"the model must take its attention from transformers' AttentionInterface, {type(model).__name__} does not",
    )
    turns = vars(model).setdefault("_draftdiff_turns", _Turns())
    with turns.lock:
        left = set(turns.left)
        observation = _Observation(model, observer)
        try:
            observation.begin(model)
            yield
        finally:
            observation.end()
            turns.left -= left
            _forget(left if observation.shared else left | {observation.name})
            if observation.shared:
                turns.left.add(observation.name)


def _forget(names: set[str]) -> None:
    for name in names:
        forget_attention(name)


class _Observation:
    """An attention under a name of its own, which calls the observer and then what the model had before."""

    def __init__(self, model: PreTrainedModel, observer: Observer) -> None:
        self.observer: Observer | None = observer
        self.name = f"draftdiff_observer_{next(_NUMBERS)}"  # never another's: a thread may look up one that is gone
        self.owner, self.shared = threading.get_ident(), False  # whether another thread came by, too
        self.before = [(config, attention_name(config)) for config in _configs(model)]
        self.whole = attention_name(model.config)

    def begin(self, model: PreTrainedModel) -> None:
        AttentionInterface.register(self.name, self.attend)
        AttentionMaskInterface.register(self.name, self.make_mask)
        model.set_attn_implementation(self.name)

    def end(self) -> None:
        for config, name in self.before:
            set_attention_name(config, name)
        self.observer = None  # what it holds must not live as long as a name that is left

    def own(self, config: Any) -> str:
        """The attention that the model has by itself where this is the configuration."""
        return next((name for known, name in self.before if known is config), self.whole)

    def make_mask(self, *args: Any, config: Any = None, **given: Any) -> Any:
        return AttentionMaskInterface()[self.own(config)](*args, config=config, **given)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **given: Any
    ) -> tuple[Tensor, Tensor | None]:
        out = None
        if threading.get_ident() != self.owner:
            self.shared = True
        elif self.observer is not None:
            scale = given.get("scaling")
            call = AttentionCall(
                getattr(module, "layer_idx", -1),
                module,
                query,
                key,
                value,
                query.shape[-1] ** -0.5 if scale is None else scale,
                attention_mask,
                given.get("softcap"),
                given.get("sliding_window"),
                given.get("s_aux"),
            )
            out = self.observer(call)
        if out is not None:
            return out, None
        return attention_of(module, self.own(module.config))(module, query, key, value, attention_mask, **given)


def _configs(model: PreTrainedModel) -> list[Any]:
    found = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    for config in found:  # grows while it is walked: configurations hold others
        found += [inner for name in config.sub_configs if (inner := getattr(config, name, None)) is not None]
    return found
