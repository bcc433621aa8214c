"""How diffusers' attention is made to call ours: a processor in the place of a layer's own.

One that goes through diffusers' dispatcher gets the backend registered there. One that calls PyTorch's attention
directly runs inside a mode that catches this one call. Its own code runs in both cases, only the kernel changes.
"""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from draftdiff.hosts.dispatcher import ALONE, BACKEND


class _CatchAttention(TorchFunctionMode):
    """Sends `scaled_dot_product_attention` ([batch, heads, tokens, head_dim]) to draft attention."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.unflatten:
            # Dynamo cannot trace the Python body of the method inside a mode; the function is the same.
            return torch.unflatten(*args, **kwargs)
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args)) | kwargs
        query, key, value = (named[name].transpose(1, 2) for name in ("query", "key", "value"))

        def dense() -> Tensor:
            return func(*args, **kwargs).transpose(1, 2)

        options = {
            "mask": named.get("attn_mask"),
            "scale": named.get("scale"),
            "dropout": named.get("dropout_p", 0.0),
            "causal": named.get("is_causal", False),
            "gqa": named.get("enable_gqa", False),
        }
        return self.layer.attend(self.layer, query, key, value, options, ALONE, dense).transpose(1, 2)


@functools.lru_cache(maxsize=16)
def _flex_through_us(code: type) -> type:
    """A processor class whose calls of the dispatcher name FlexAttention, as one that names ours."""
    stock: Any = code.__call__  # type: ignore[operator]

    def dispatch(*args: Any, backend: Any = None, **kwargs: Any) -> Tensor:
        return dispatch_attention_fn(*args, backend=AttentionBackendName(BACKEND), **kwargs)

    names = stock.__globals__ | {"dispatch_attention_fn": dispatch}
    call = FunctionType(stock.__code__, names, stock.__name__, stock.__defaults__, stock.__closure__)
    call.__kwdefaults__ = stock.__kwdefaults__
    return type(code.__name__, (code,), {"__call__": call})


@functools.lru_cache(maxsize=64)
def _stand_in_class(code: type, route: str) -> type:
    """A processor class that runs `code` as a layer's, in the place of a `stock` one."""
    given, code = code, _flex_through_us(code) if route == "flex" else code

    class StandIn(code):  # type: ignore[misc, valid-type]
        __slots__ = ("draft_layer", "draft_stock")

        @functools.wraps(code.__call__)  # type: ignore[operator]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if route == "sdpa":
                with _CatchAttention(self.draft_layer):
                    return super().__call__(*args, **kwargs)
            calling = _AttentionBackendRegistry._backends[self.draft_layer.backend].calling
            calling.layer = self.draft_layer
            try:
                return super().__call__(*args, **kwargs)
            finally:
                calling.layer = None

        def __setattr__(self, name: str, value: Any) -> None:
            """What is set on this is stock's; a backend is stock's only."""
            setattr(self.draft_stock, name, value)
            if route in ("sdpa", "flex") or name != "_attention_backend":
                super().__setattr__(name, value)

        def __reduce_ex__(self, protocol: Any) -> tuple:
            return stand_in, (self.draft_stock, self.draft_layer, given, route)

    return StandIn


def stand_in(stock: Any, layer: Any, code: type | None = None, route: str = "dispatch") -> Any:
    """A processor that does what `stock` does, as this layer and with our attention.

    code: the class whose code runs, if not stock's own.  route: how it reaches its kernel, of `Layout.route`.
    It has stock's attributes, and what is set on it (an adapter's scale, a parallel config) is set on stock; only its
    backend is ours, and one that is chosen for it becomes stock's.
    """
    kind = _stand_in_class(code or type(stock), route)
    known = AttentionProcessorRegistry._registry
    AttentionProcessorRegistry._register()
    if type(stock) in known:  # layer-skip hooks look up by class how a processor is skipped
        known[kind] = known[type(stock)]
    mine: Any = object.__new__(kind)
    mine.__dict__.update(stock.__dict__)
    if route not in ("sdpa", "flex"):
        mine.__dict__["_attention_backend"] = AttentionBackendName(BACKEND)
    object.__setattr__(mine, "draft_stock", stock)
    object.__setattr__(mine, "draft_layer", layer)
    return mine
