"""Our entry in diffusers' attention dispatcher, alone and under its context parallelism."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _templated_context_parallel_attention,
    dispatch_attention_fn,
)
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from draftdiff.errors import UserError

BACKEND = "draftdiff"


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
