"""Watch a transformers model's attention from outside: under a temporary attention name, gone again on exit."""

from __future__ import annotations

import inspect
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from draftdiff.core.importance import attention_mass


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
        if self.mask is not None and not isinstance(self.mask, Tensor):
            raise ValueError(
                f"attention masks must be tensors, got {type(self.mask).__name__}; load the model with "
                "attn_implementation 'sdpa' or 'eager'"
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
# An attention implementation belongs to the model, not to a thread: one observes at a time.
_TURNS: weakref.WeakKeyDictionary[PreTrainedModel, threading.RLock] = weakref.WeakKeyDictionary()
_ALONE = threading.Lock()
_RETIRED: dict[str, float] = {}  # names and when they may go


@contextmanager
def observing(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Call observer before each attention of the model while the context lasts.

    What it returns, [batch, queries, heads, head_dim], stands in for the attention; None leaves it to the model's own
    implementation, with outputs bit for bit as without an observer; so it is for other threads that use the model
    meanwhile, while those that would observe it too wait for their turn. On exit, also by an exception, the
    implementations are what they were and the temporary name is in no registry (where another thread used it, the next
    context a second later takes it out). Contexts may be nested.
    Raises ValueError for a model that does not take its attention from transformers' AttentionInterface.
    """
    if not _dispatches(model):
        raise ValueError(
            f"the model must take its attention from transformers' AttentionInterface, {type(model).__name__} does not"
        )
    with _ALONE:
        turn = _TURNS.setdefault(model, threading.RLock())
    with turn:
        yield from _observing(model, observer)


def _observing(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    owner, shared = threading.get_ident(), False
    before = {id(config): (config, config._attn_implementation) for config in _configs(model)}

    def own(config: Any) -> str:
        return before.get(id(config), before[id(model.config)])[1]

    def is_owner() -> bool:
        nonlocal shared
        shared |= threading.get_ident() != owner
        return threading.get_ident() == owner

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **given: Any
    ) -> tuple[Tensor, Tensor | None]:
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
        out = observer(call) if is_owner() else None
        if out is not None:
            return out, None
        return _implementation(module, own(module.config))(module, query, key, value, attention_mask, **given)

    def make_mask(*args: Any, config: Any = None, **given: Any) -> Any:
        return AttentionMaskInterface()[own(config)](*args, config=config, **given)

    name = f"draftdiff_observer_{id(attend):x}"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, make_mask)
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        for config, implementation in before.values():
            config._attn_implementation_internal = implementation
        observer = _nothing
        # Another thread that uses the model may have just read the name from it and be about to look it up.
        with _ALONE:
            _RETIRED[name] = time.monotonic() + (1.0 if shared else 0.0)
            _forget_names()


def _nothing(call: AttentionCall) -> None:
    """What is observed once a context has ended."""


def _forget_names() -> None:
    now = time.monotonic()
    for name in [name for name, due in _RETIRED.items() if due <= now]:
        del _RETIRED[name]
        # The registries have no public way to take a name out.
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


def _dispatches(model: PreTrainedModel) -> bool:
    homes = {type(module).__module__ for module in model.modules() if hasattr(module, "layer_idx")}
    return bool(homes) and all("get_interface" in inspect.getsource(sys.modules[home]) for home in homes)


def _configs(model: PreTrainedModel) -> list[Any]:
    found = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    for config in found:  # grows while it is walked: configurations hold others
        found += [inner for name in config.sub_configs if (inner := getattr(config, name, None)) is not None]
    return found


def _implementation(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that the module itself would have called: "eager" is each modelling file's own."""
    home = vars(sys.modules[type(module).__module__])
    registry = home.get("ALL_ATTENTION_FUNCTIONS", AttentionInterface())
    return registry.get_interface(name, home.get("eager_attention_forward"))
