"""How an attention processor of diffusers is made to call draft attention: its own code runs, only the kernel changes.

A processor that goes through diffusers' dispatcher gets a backend registered there. One that calls PyTorch's attention
directly runs inside a mode that catches this one call.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _templated_context_parallel_attention,
    dispatch_attention_fn,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

# (layer, query, key, value [batch, tokens, heads, head_dim], mask, scale, dense) -> output like query;
# dense() is the attention that would have been without us.
Attend = Callable[[Any, Tensor, Tensor, Tensor, Any, float | None, Callable[[], Tensor]], Tensor]


def register_backend(name: str, attend: Attend, current: Any) -> AttentionBackendName:
    """Add a backend to diffusers' dispatcher; `current.layer` is the layer that calls. Undone by `remove_backend`.

    `current` is held weakly. A model dropped without that leaves an entry, which the next registration clears away: not
    the collector, which could change the dispatcher's tables while they are being compiled against.
    """
    for member, function in list(_AttentionBackendRegistry._backends.items()):
        owner = getattr(function, "draft_owner", None)
        if owner is not None and owner() is None:
            remove_backend(member)
    owner = weakref.ref(current)
    member = str.__new__(AttentionBackendName, name)
    member._name_, member._value_ = name.upper(), name
    AttentionBackendName._member_map_[member._name_] = member
    AttentionBackendName._member_names_.append(member._name_)
    AttentionBackendName._value2member_map_[name] = member

    def backend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        state = owner()
        assert state is not None  # its processors hold it
        layer = state.layer
        options = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if _parallel_config is None or not layer.sparse:

            def dense() -> Tensor:
                return dispatch_attention_fn(
                    query, key, value, *options, backend=layer.dense_backend, parallel_config=_parallel_config
                )

            return attend(layer, query, key, value, attn_mask, scale, dense)

        if (_parallel_config.context_parallel_config.ring_degree or 1) > 1:
            raise ValueError("ring context parallelism is not supported by draft attention; use ulysses_degree")

        # Under Ulysses each process sees all tokens and a share of the heads.
        def local(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
            def dense() -> Tensor:
                return dispatch_attention_fn(query, key, value, *options, backend=layer.dense_backend)

            return attend(layer, query, key, value, attn_mask, scale, dense)

        return _templated_context_parallel_attention(
            query, key, value, *options, False, forward_op=local, backward_op=None, _parallel_config=_parallel_config
        )

    backend.draft_owner = owner  # type: ignore[attr-defined]
    _AttentionBackendRegistry.register(member, supports_context_parallel=True)(backend)
    return member


def remove_backend(member: AttentionBackendName) -> None:
    AttentionBackendName._member_map_.pop(member._name_)
    AttentionBackendName._member_names_.remove(member._name_)
    AttentionBackendName._value2member_map_.pop(member._value_)
    for table in ("_backends", "_constraints", "_supported_arg_names"):
        getattr(_AttentionBackendRegistry, table).pop(member, None)
    _AttentionBackendRegistry._supports_context_parallel.discard(member.value)


class _CatchAttention(TorchFunctionMode):
    """Sends `scaled_dot_product_attention` ([batch, heads, tokens, head_dim]) to draft attention."""

    def __init__(self, layer: Any, attend: Attend) -> None:
        super().__init__()
        self.layer, self.attend = layer, attend

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.unflatten:
            # Dynamo cannot trace the Python body of the method inside a mode; the function is the same.
            return torch.unflatten(*args, **kwargs)
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value", "attn_mask"), args)) | kwargs
        query, key, value = (named[name].transpose(1, 2) for name in ("query", "key", "value"))

        def dense() -> Tensor:
            return func(*args, **kwargs).transpose(1, 2)

        mask, scale = named.get("attn_mask"), named.get("scale")
        return self.attend(self.layer, query, key, value, mask, scale, dense).transpose(1, 2)


@functools.lru_cache(maxsize=64)
def _noting_class(processor_class: type) -> type:
    """A subclass whose calls note the layer they come from, for a backend that sees tensors only."""

    class Noting(processor_class):  # type: ignore[misc, valid-type]
        @functools.wraps(processor_class.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self.draft_current.layer = self.draft_layer
            return super().__call__(*args, **kwargs)

    return Noting


@functools.lru_cache(maxsize=64)
def _catching_class(processor_class: type) -> type:
    """A subclass whose calls run with `_CatchAttention`."""

    class Catching(processor_class):  # type: ignore[misc, valid-type]
        @functools.wraps(processor_class.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with _CatchAttention(self.draft_layer, self.draft_attend):
                return super().__call__(*args, **kwargs)

    return Catching


def through_backend(processor: Any, layer: Any, current: Any, backend: AttentionBackendName) -> Any:
    """A copy of a processor that calls a registered backend, as this layer."""
    mine = copy.copy(processor)
    mine.__class__ = _noting_class(type(processor))  # type: ignore[arg-type]
    mine.draft_layer, mine.draft_current, mine._attention_backend = layer, current, backend
    return mine


def through_catch(processor: Any, layer: Any, attend: Attend) -> Any:
    """A copy of a processor whose call of PyTorch's attention is caught, as this layer's."""
    mine = copy.copy(processor)
    mine.__class__ = _catching_class(type(processor))  # type: ignore[arg-type]
    mine.draft_layer, mine.draft_attend = layer, attend
    return mine


def dense_backend(processor: Any) -> AttentionBackendName:
    """The dispatcher's backend that a processor would use."""
    chosen = getattr(processor, "_attention_backend", None)
    return AttentionBackendName(chosen) if chosen else _AttentionBackendRegistry.get_active_backend()[0]
