"""The cache of one generation: keys and values of the scales so far, and what a condition fixes once for all scales.

It is an object that the caller makes, passes to every forward of one model and drops: models keep no state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from draftdiff.var.last_scales import LastScales

Value = TypeVar("Value")
Place: TypeAlias = "int | tuple[int, int]"


class KVCache:
    """Keys and values per layer, each [batch, heads, tokens, head_dim].

    A place is a layer, by its number, or a group of its heads that holds as many tokens each: (layer, group).
    key_dtype: dtype in which keys are kept, that of the values if None. The originals keep fp32 keys beside half
    values, because normalisation and rotation upcast; attention rounds them to half either way, so logits are the same
    to the bit without, and a third of the cache is saved.
    last_scales: which scales attend by a draft map, none if None.
    """

    def __init__(self, key_dtype: torch.dtype | None = None, last_scales: LastScales | None = None) -> None:
        self.key_dtype = key_dtype
        self.last_scales = last_scales
        self.keys: dict[Place, Tensor] = {}
        self.values: dict[Place, Tensor] = {}
        self._fixed: dict[Any, Any] = {}

    def groups(self, layer: int) -> list[tuple[Place, Tensor]]:
        """The places of a layer with the heads, int64, at each; none where the layer is one place."""
        return []

    def extend(self, place: Place, key: Tensor, value: Tensor, *, keep: bool = True) -> tuple[Tensor, Tensor]:
        """Append a call's keys and values [batch, heads, new tokens, head_dim]; returns all of them, history first, in
        the dtype of `value`.

        keep: False for the last scale, which no later one will read.
        """
        stored = key.to(self.key_dtype or value.dtype)
        if place in self.keys:
            stored = torch.cat([self.keys[place], stored], dim=2)
            value = torch.cat([self.values[place], value], dim=2)
        if keep:
            # The first ones may be views of a projection that holds queries too, which would stay in memory with them.
            stored, value = stored.contiguous(), value.contiguous()
            self.keys[place], self.values[place] = stored, value
        return stored.to(value.dtype), value

    def observe(self, place: Place, query: Tensor, key: Tensor, raw_query: Callable[[], Tensor]) -> None:
        """Called for each place of a layer after its attention; subclasses measure or evict here.

        query: of the new tokens, with the scale of the softmax in them, [batch, heads, new tokens, head_dim].
        key: all that they saw, history first.  raw_query: gives those queries before bias, normalisation and rotation.
        """

    def once(self, name: Any, compute: Callable[[], Value]) -> Value:
        """What `compute` returned at the first call with this name: for tensors that depend on the condition alone."""
        if name not in self._fixed:
            self._fixed[name] = compute()
        return self._fixed[name]

    def tokens(self, place: Place = 0) -> int:
        """Keys held at a place, per batch item and head."""
        return self.keys[place].shape[2] if place in self.keys else 0

    def keep_rows(self, count: int) -> None:
        """Let go of all batch items but the first `count`, and of what their conditions fixed."""
        self.keys = {place: key[:count].clone() for place, key in self.keys.items()}
        self.values = {place: value[:count].clone() for place, value in self.values.items()}
        self._fixed.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held, measured on the storages that back them."""
        tensors = (*self.keys.values(), *self.values.values())
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def clear(self) -> None:
        """Let go of everything."""
        self.keys.clear()
        self.values.clear()
        self._fixed.clear()
