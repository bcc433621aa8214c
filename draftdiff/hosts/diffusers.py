"""Every private name of diffusers that we use, and how its attention is made to call ours.

A processor that goes through diffusers' dispatcher gets a backend registered there. One that calls PyTorch's attention
directly runs inside a mode that catches this one call. Its own code runs in both cases, only the kernel changes.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, FunctionType, SimpleNamespace
from typing import Any

import diffusers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _templated_context_parallel_attention,
    dispatch_attention_fn,
)
from diffusers.modular_pipelines import ModularPipeline
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from draftdiff.core.devices import chosen_dtype
from draftdiff.errors import UserError

BACKEND = "draftdiff"
# Of from_pretrained: the old name warns where the new one exists.
DTYPE_ARGUMENT = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"


@dataclass(frozen=True)
class Share:
    """What one process has of a call that several make together (diffusers' context parallelism).

    Each stream of tokens was cut into `pieces`, one for each process in order. Queries are of `count` pieces from
    `first` on, keys and values of all.  heads_from: which of the layer's heads the first one here is.
    """

    pieces: int = 1
    first: int = 0
    count: int = 1
    heads_from: int = 0
    group: Any = None

    def summed(self, x: Tensor) -> Tensor:
        """Over the processes that have the other queries, in x."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def sizes(self, tokens: int) -> list[int]:
        """Of the pieces that so many tokens were cut into."""
        each, more = divmod(tokens, self.pieces)
        return [each + (piece < more) for piece in range(self.pieces)]


ALONE = Share()
# (layer, query, key, value [batch, tokens, heads, head_dim], options of the call, what this process has of it, dense)
# -> output like query. dense() is the attention that would have been without us.
Attend = Callable[[Any, Tensor, Tensor, Tensor, dict[str, Any], Share, Callable[[], Tensor]], Tensor]


def with_one_dtype(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a from_pretrained whose `dtype` or `torch_dtype`, which may be names, become the one that this
    version knows; diffusers takes any name for float32. Raises ValueError for what is no dtype."""
    rest = {name: value for name, value in arguments.items() if name not in ("dtype", "torch_dtype")}
    given = [arguments.get(name) for name in ("dtype", "torch_dtype")]
    one_each = next((value for value in given if isinstance(value, dict)), None)
    if one_each is not None:  # of a pipeline, by part
        return rest | {DTYPE_ARGUMENT: {part: chosen_dtype(value, None) for part, value in one_each.items()}}
    dtype = chosen_dtype(*given)
    return rest if dtype is None else rest | {DTYPE_ARGUMENT: dtype}


class _Calling(threading.local):
    """The layer whose processor is running in this thread, for a backend that sees tensors only."""

    layer: Any = None


class _Backend:
    """Our entry in diffusers' dispatcher: hands a call on to the attention of the layer that calls."""

    def __init__(self) -> None:
        self.calling = _Calling()
        self.owners: weakref.WeakSet[Any] = weakref.WeakSet()

    def __call__(
        self,
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
        layer = self.calling.layer
        given = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
        # None is what the user's `attention_backend` context, or the default, says at this moment.
        if isinstance(attn_mask, BlockMask):  # which no other reads
            stock = AttentionBackendName.FLEX
        else:
            stock = AttentionBackendName.NATIVE if layer is None else layer.stock_backend

        def dense() -> Tensor:
            return dispatch_attention_fn(query, key, value, *given, backend=stock, parallel_config=_parallel_config)

        if layer is None:
            return dense()
        options = {
            "mask": _over_keys(attn_mask, query, key),
            "scale": scale,
            "dropout": dropout_p,
            "causal": is_causal,
            "gqa": enable_gqa,
        }
        if _parallel_config is None or not layer.is_sparse:
            return layer.attend(layer, query, key, value, options, ALONE, dense)
        if torch.is_grad_enabled() and query.requires_grad:
            raise UserError("draft attention cannot be trained under context parallelism; disable it for training")
        parallel = _parallel_config.context_parallel_config
        ulysses, ring = parallel.ulysses_degree or 1, parallel.ring_degree or 1

        def local(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *_: Any, **__: Any) -> Tensor:
            """All that this process computes: of its heads, its group's queries with the keys of all."""
            mine = parallel._ulysses_local_rank * math.ceil(heads / ulysses)
            group = parallel._ring_mesh.get_group() if ring > 1 else None
            share = Share(ulysses * ring, parallel._ring_local_rank * ulysses, ulysses, mine, group)
            if ring > 1:
                uneven = bool(getattr(parallel, "ring_anything", False))
                key, value = (_gathered(x, 1, group, uneven) for x in (key, value))
                if mask is not None and mask.shape[-1] != key.shape[1]:
                    mask = _gathered(mask, mask.ndim - 1, group, uneven)

            def dense() -> Tensor:
                return dispatch_attention_fn(query, key, value, mask, *given[1:], backend=stock)

            here = options | {"mask": _over_keys(mask, query, key)}
            return layer.attend(layer, query, key, value, here, share, dense)

        heads = query.shape[2]
        if ulysses == 1:
            return local(None, query, key, value, attn_mask)
        # diffusers brings the heads to their processes and back; what rings there would be, `local` is.
        no_ring = SimpleNamespace(context_parallel_config=_WithoutRing(parallel))
        return _templated_context_parallel_attention(
            query, key, value, *given, False, forward_op=local, backward_op=None, _parallel_config=no_ring
        )


class _WithoutRing:
    """A parallel config as if its ring were of one process."""

    ring_degree = 1

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _gathered(x: Tensor, axis: int, group: Any, uneven: bool) -> Tensor:
    """The pieces of all processes of a group one after another along an axis."""
    sizes = [x.shape[axis]] * dist.get_world_size(group)
    if uneven:
        told = torch.tensor([x.shape[axis]], device=x.device)
        every = [torch.empty_like(told) for _ in sizes]
        dist.all_gather(every, told, group=group)
        sizes = torch.cat(every).tolist()
    x = x.movedim(axis, 0)
    padded = torch.cat([x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])]) if len(x) < max(sizes) else x.contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)]).movedim(0, axis)


def _over_keys(mask: Any, query: Tensor, key: Tensor) -> Any:
    """A mask with the dispatcher's two forms of one over keys, [batch, keys] and [batch, 1, 1, keys], as the latter."""
    flat = isinstance(mask, Tensor) and tuple(mask.shape) == (query.shape[0], key.shape[1])
    return mask[:, None, None] if flat else mask


def backend_for(owner: Any) -> Any:
    """Our entry in diffusers' dispatcher, made if it is not there; it stays while an owner lives and has not let go.

    A model that is dropped without `release_backend` leaves the entry until another one's release.
    """
    member = AttentionBackendName._value2member_map_.get(BACKEND)
    if member is None:
        member = str.__new__(AttentionBackendName, BACKEND)
        member._name_, member._value_ = BACKEND.upper(), BACKEND
        AttentionBackendName._member_map_[member._name_] = member
        AttentionBackendName._member_names_.append(member._name_)
        AttentionBackendName._value2member_map_[BACKEND] = member
        _AttentionBackendRegistry.register(member, supports_context_parallel=True)(_Backend())
    _AttentionBackendRegistry._backends[member].owners.add(owner)
    return member


def release_backend(owner: Any) -> None:
    """Undo `backend_for` and what `stand_in` registered: they go with their last owner."""
    member = AttentionBackendName._value2member_map_.get(BACKEND)
    if member is None:
        return
    owners = _AttentionBackendRegistry._backends[member].owners
    owners.discard(owner)
    if owners:
        return
    for kind in [kind for kind in AttentionProcessorRegistry._registry if hasattr(kind, "draft_layer")]:
        del AttentionProcessorRegistry._registry[kind]
    AttentionBackendName._member_map_.pop(member._name_)
    AttentionBackendName._member_names_.remove(member._name_)
    AttentionBackendName._value2member_map_.pop(BACKEND)
    for table in ("_backends", "_constraints", "_supported_arg_names"):
        getattr(_AttentionBackendRegistry, table).pop(member)
    _AttentionBackendRegistry._supports_context_parallel.discard(BACKEND)


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


_HEADS = ("heads", "num_heads", "num_attention_heads")


def heads_of(attention: Any) -> int:
    return next(getattr(attention, name) for name in _HEADS if hasattr(attention, name))


def head_dim_of(attention: Any) -> int:
    if isinstance(getattr(attention, "head_dim", None), int):  # FLUX.2 has no layer for queries alone
        return attention.head_dim
    project = attention.to_q if hasattr(attention, "to_q") else attention.to_query
    return project.out_features // heads_of(attention)


def projection_of(attention: Any) -> Tensor | None:
    """Weight of the linear layer that joins an attention's heads, [width, heads * head_dim]; None where there is no
    plain one."""
    project: Any = getattr(attention, "to_out", None)
    project = project[0] if isinstance(project, nn.ModuleList) and len(project) else project
    if type(project) is not nn.Linear or project.in_features != heads_of(attention) * head_dim_of(attention):
        return None
    return project.weight


def is_watched() -> bool:
    """Whether some torch function mode would see PyTorch's attention here: it may replace it, as perturbed-attention
    guidance does. Devices set by `with torch.device` do not."""
    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def is_skipped(attention: nn.Module) -> bool:
    """Whether a layer-skip hook of diffusers stands before an attention module."""
    registry = getattr(attention, "_diffusers_hook", None)
    return registry is not None and any(isinstance(h, AttentionProcessorSkipHook) for h in registry.hooks.values())


def running_pipelines() -> list[tuple[FrameType, Any]]:
    """(frame, pipeline) of the pipelines that are calling, the innermost first.

    A transformer may serve several pipelines, and they do not tell it which one runs; the interpreter's stack does.
    """
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            if isinstance(owner, (DiffusionPipeline, ModularPipeline)):
                found.append((frame, owner))
        frame = frame.f_back
    return found


@contextmanager
def checkpoints_through(model: nn.Module, bind: Callable[[Callable], Callable]) -> Iterator[None]:
    """While it lasts, gradient checkpointing of a model keeps bind(block) instead of block to be run again."""
    found = [m for m in model.modules() if getattr(m, "_gradient_checkpointing_func", None) is not None]
    stock = [m._gradient_checkpointing_func for m in found]

    def bound(function: Callable) -> Callable:
        return lambda block, *args: function(bind(block), *args)

    for module, function in zip(found, stock):
        module._gradient_checkpointing_func = bound(function)  # type: ignore[arg-type, assignment]
    try:
        yield
    finally:
        for module, function in zip(found, stock):
            module._gradient_checkpointing_func = function  # type: ignore[assignment]
