"""Scale after scale through one model and its cache."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from draftdiff.var.cache import KVCache


class ScaleDecoder:
    """One model and one cache; scales: how many there are; the keys of the last are not kept.

    forward: of the model, with what conditions it, called with inputs, first_scale, logits_from, cache, keep and
    return_dict.
    """

    def __init__(self, forward: Callable[..., tuple[Tensor]], cache: KVCache, scales: int) -> None:
        self.forward = forward
        self.cache = cache
        self.last = scales - 1

    def logits(self, scale: int, inputs: Tensor | None, first_scale: int | None = None) -> Tensor:
        """Logits [batch, tokens, vocabulary] of a scale; inputs [batch, tokens, channels], None at scale 0.

        first_scale: of the inputs, `scale` if None; the scales before it are in the cache, those up to `scale` here.
        """
        first, keep = scale if first_scale is None else first_scale, scale < self.last
        return self.forward(
            inputs, first_scale=first, logits_from=scale, cache=self.cache, keep=keep, return_dict=False
        )[0]
