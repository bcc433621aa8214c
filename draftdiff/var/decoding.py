"""Scale after scale through one model and its cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from draftdiff.var.cache import KVCache


class Decoder(Protocol):
    """Gives the logits of each scale in turn."""

    @property
    def cache(self) -> KVCache:
        """Of the model at work."""
        ...

    def logits(self, scale: int, inputs: Tensor | None) -> Tensor:
        """Logits [batch, tokens, vocabulary] of a scale; inputs [batch, tokens, channels], None at scale 0."""
        ...


class ScaleDecoder:
    """One model, called as `forward(inputs, first_scale=, logits_from=, cache=, keep=, return_dict=)`,
    and one cache.

    scales: how many there are; the keys of the last are not kept.
    """

    def __init__(self, forward: Callable[..., tuple[Tensor]], cache: KVCache, scales: int) -> None:
        self.forward = forward
        self.cache = cache
        self.last = scales - 1

    def logits(self, scale: int, inputs: Tensor | None, first_scale: int | None = None) -> Tensor:
        """See Decoder.

        first_scale: of the inputs, `scale` if None; the scales before it are in the cache, those up to `scale` here.
        """
        first, keep = scale if first_scale is None else first_scale, scale < self.last
        return self.forward(
            inputs, first_scale=first, logits_from=scale, cache=self.cache, keep=keep, return_dict=False
        )[0]
