"""A cache whose layers were cut down to a part of the prompt and still report its whole length.

Positions, padding masks and appended tokens stay right because the host asks a layer for its length; see
transformers.cache_utils. Layers that slide over a window of their own stay the host's: they are small already.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from draftdiff.core.importance import gather_kv
from draftdiff.llm.checks import require


class KeptLayer(DynamicLayer):
    """Keys and values [batch, key heads, physical length, head_dim], of which `dropped` more tokens once were there.

    What is dropped counts as the oldest tokens: `get_seq_length` is the logical length, physical + dropped.
    """

    keys: Tensor | None
    values: Tensor | None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dropped = 0
        self._fixed = 0  # physical tokens that are out of order since the last `keep`

    @property
    def physical_length(self) -> int:
        """Tokens whose keys and values are there."""
        return 0 if self.keys is None else self.keys.shape[-2]

    def get_seq_length(self) -> int:
        return self.physical_length + self.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.physical_length + query_length, self.dropped

    def keep(self, indices: Tensor, length: int) -> None:
        """Keep the tokens at physical indices, int64 [batch, key heads, kept], ascending, for a logical length."""
        assert self.keys is not None and self.values is not None
        self.dropped = length - indices.shape[-1]
        self.keys, self.values = gather_kv(self.keys, self.values, indices)
        self._fixed = indices.shape[-1]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens. Raises ValueError for a positive number, which would be an absolute
        length in older hosts, and for more tokens than came after the last `keep`."""
        require(tokens_to_remove <= 0, f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        if tokens_to_remove == 0 or self.keys is None or self.values is None:
            return
        fresh = self.physical_length - (self._fixed if self.dropped else 0)
        require(
            -tokens_to_remove <= fresh,
            f"at most {fresh} tokens came after the eviction and can be removed, got {tokens_to_remove}",
        )
        self.keys, self.values = self.keys[..., :tokens_to_remove, :], self.values[..., :tokens_to_remove, :]

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.dropped = self._fixed = 0


class WindowLayer(KeptLayer):
    """A sliding-window layer that keeps what it is fed until told to forget, so that branches can be taken back."""

    is_sliding = True

    def __init__(self, layer: DynamicSlidingWindowLayer) -> None:
        super().__init__()
        self.window = layer.sliding_window
        if layer.is_initialized:
            self.lazy_initialization(layer.keys, layer.values)
            self.keys, self.values = layer.keys, layer.values
        self.dropped = layer.get_seq_length() - self.physical_length

    def forget(self) -> None:
        """Drop what is out of the window, once that is most of the layer."""
        if self.keys is not None and self.values is not None and self.physical_length > 2 * self.window:
            self.dropped += self.physical_length - (self.window - 1)
            self.keys = self.keys[..., 1 - self.window :, :].clone()
            self.values = self.values[..., 1 - self.window :, :].clone()


class KeptCache(DynamicCache):
    """The cache of a model's configuration with a KeptLayer in place of each layer of full attention.

    Raises ValueError for a model with layers that are neither full nor sliding-window attention, or with only the
    latter.
    """

    layers: list[Any]

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        kind = config.model_type
        for number, layer in enumerate(self.layers):
            require(
                type(layer) in (DynamicLayer, DynamicSlidingWindowLayer),
                f"layers must be full or sliding-window attention, layer {number} of {kind} keeps a "
                f"{type(layer).__name__}",
            )
        require(
            getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0) == len(self.layers),
            f"each layer must have keys of its own, {kind} shares them between layers",
        )
        self.layers = [KeptLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        require(
            bool(self.kept_layers),
            f"there must be a layer to evict from, all {len(self.layers)} of {kind} have a window",
        )

    @property
    def kept_layers(self) -> dict[int, KeptLayer]:
        """The layers that are evicted from, by number."""
        return {number: layer for number, layer in enumerate(self.layers) if isinstance(layer, KeptLayer)}

    @property
    def nbytes(self) -> int:
        """Of all keys and values held."""
        held = [x for layer in self.layers if layer.keys is not None for x in (layer.keys, layer.values)]
        return sum(x.untyped_storage().nbytes() for x in held)


def end_sliding_layer(layer: DynamicSlidingWindowLayer, key: Tensor, value: Tensor, length: int) -> None:
    """Make a sliding layer what it would be after the first `length` tokens of key and value [batch, heads, n, dim]."""
    start = max(length - layer.sliding_window + 1, 0)
    layer.keys, layer.values = (x[:, :, start:length].clone() for x in (key, value))
    layer.cumulative_length = length
