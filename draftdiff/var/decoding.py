"""Scale after scale through one model and its cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from draftdiff.var.cache import KVCache
from draftdiff.var.transformer_var import VARTransformer2DModel


class Decoder(Protocol):
    """Gives the logits of each scale in turn."""

    @property
    def cache(self) -> KVCache:
        """Of the model at work."""
        ...

    def logits(self, scale: int, inputs: Tensor | None, class_labels: Tensor) -> Tensor:
        """Logits [batch, tokens, vocabulary] of a scale; inputs [batch, tokens, channels], None at scale 0."""
        ...


class ScaleDecoder:
    """One model, one cache, which `new_cache` makes for it."""

    def __init__(self, model: VARTransformer2DModel, new_cache: Callable[[VARTransformer2DModel], KVCache]) -> None:
        self.model = model
        self.cache = new_cache(model)
        self.last = len(model.config.patch_nums) - 1

    def logits(self, scale: int, inputs: Tensor | None, class_labels: Tensor) -> Tensor:
        """See Decoder. The keys of the last scale are not kept."""
        return self.model(
            inputs, class_labels, first_scale=scale, cache=self.cache, keep=scale < self.last, return_dict=False
        )[0]
