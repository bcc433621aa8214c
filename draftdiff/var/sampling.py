"""Drawing tokens from logits: top-k and top-p filters, and the random numbers, our way or the originals'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Generator, Tensor

Generators: TypeAlias = Generator | Sequence[Generator] | None


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Set to -inf what may not be drawn; logits [..., vocabulary].

    top_k: keep the k largest and what ties with the k-th; 0 keeps all.  top_p: then drop the least likely entries whose
    joint probability is at most 1 - top_p, never the likeliest; 0 or 1 drops none.
    """
    vocabulary = logits.shape[-1]
    if not 0 < top_k < vocabulary:
        top_k = vocabulary
    nucleus = 0 < top_p < 1
    if top_k == vocabulary and not nucleus:
        return logits
    if top_k < vocabulary:
        largest = logits.topk(top_k, dim=-1).values
        logits = logits.masked_fill(logits < largest[..., -1:], -torch.inf)
    if nucleus:
        # What the top-k filter removed has no probability: the kept entries alone give the same sums.
        ascending = largest.flip(-1) if top_k < vocabulary else logits.sort(dim=-1).values
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[..., -1] = False
        least = ascending.gather(-1, dropped.sum(-1, keepdim=True))
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def at(value: Any, scale: int) -> Any:
    """A setting that is one value, or one per scale."""
    return value[scale] if isinstance(value, Sequence) else value


class Draws:
    """The random numbers of one generation.

    generator: one for all pictures; one per picture, which then does not depend on the rest of its batch; or None,
    which is torch's own. Numbers are drawn on the generator's device and come to that of the logits.
    """

    def __init__(self, generator: Generators = None) -> None:
        self.sources = list(generator) if isinstance(generator, Sequence) else [generator]

    @classmethod
    def of(cls, generator: Draws | Generators) -> Draws:
        """As given, or the draws of a generator."""
        return generator if isinstance(generator, Draws) else cls(generator)

    def labels(self, count: int, classes: int) -> Tensor:
        """Class labels drawn uniformly, int64 [count], as VAR's original draws them."""
        each, drawn = count // len(self.sources), []
        for one in self.sources:
            uniform = torch.full((1, classes), 1 / classes, device="cpu" if one is None else one.device)
            drawn.append(torch.multinomial(uniform, each, replacement=True, generator=one).flatten())
        return torch.cat(drawn)

    def codes(self, logits: Tensor) -> Tensor:
        """An index from each row of logits [batch, tokens, vocabulary], int64 [batch, tokens].

        On a CPU these are the draws of torch.multinomial on the [batch * tokens, vocabulary] probabilities.
        """
        return (logits.float().softmax(-1) / self._exponential(logits)).argmax(-1)

    def unused_codes(self, logits: Tensor) -> Tensor | None:
        """The indices that the originals draw even where they then mix codes: none."""
        return None

    def mixture(self, logits: Tensor, temperature: float) -> Tensor:
        """Gumbel-softmax weights, fp32 of the shape of logits (arXiv 1611.01144, Eq. 2)."""
        return ((logits.float() - self._exponential(logits).log()) / temperature).softmax(-1)

    def bits(self, logits: Tensor, top_p: float) -> Tensor:
        """0 or 1 from each pair of logits [batch, bits, 2], int64 [batch, bits].

        A bit whose less likely value has at most 1 - top_p takes the other.
        """
        one = (logits[..., 1] - logits[..., 0]).sigmoid()
        if 0 < top_p < 1:
            one = torch.where(one <= 1 - top_p, 0.0, torch.where(one >= top_p, 1.0, one))
        return (self._noise(one, lambda noise, generator: noise.uniform_(generator=generator)) < one).long()

    def hand_over(self) -> None:
        """Called when a refiner takes over."""

    def _exponential(self, like: Tensor) -> Tensor:
        return self._noise(like, lambda noise, generator: noise.exponential_(1, generator=generator))

    def _noise(self, like: Tensor, fill: Callable[[Tensor, Generator | None], Tensor]) -> Tensor:
        """Noise, fp32, of the shape of `like` [batch, ...] and on its device."""
        shape, parts = (len(like) // len(self.sources), *like.shape[1:]), []
        for one in self.sources:
            blank = torch.empty(shape, dtype=torch.float32, device=like.device if one is None else one.device)
            parts.append(fill(blank, one).to(like.device))
        return torch.cat(parts)


class UpstreamDraws(Draws):
    """Draws, and throws away, also what the originals do, so that a seed gives the same pictures as theirs."""

    def __init__(self, generator: Generators = None) -> None:
        super().__init__(generator)
        self._start = [(one, one.get_state()) for one in self.sources if one is not None]
        self._again: list[Callable[[], Any]] = []

    def labels(self, count: int, classes: int) -> Tensor:
        """See Draws."""
        self._again.append(lambda: super(UpstreamDraws, self).labels(count, classes))
        return super().labels(count, classes)

    def codes(self, logits: Tensor) -> Tensor:
        """See Draws."""
        like = logits.new_empty(()).expand(logits.shape)  # the shape and the device, without the memory
        self._again.append(lambda: self._exponential(like))
        return super().codes(logits)

    def unused_codes(self, logits: Tensor) -> Tensor | None:
        """See Draws."""
        return self.codes(logits)

    def bits(self, logits: Tensor, top_p: float) -> Tensor:
        """Each bit as one of two classes: two random numbers instead of one."""
        return super().codes(filter_logits(logits, 0, top_p))

    def hand_over(self) -> None:
        """CoDe's original refiner starts from the seed again, and draws labels and drafted scales once more."""
        for one, state in self._start:
            one.set_state(state)
        for draw in self._again:
            draw()


DRAWS: dict[str, type[Draws]] = {"fast": Draws, "upstream": UpstreamDraws}  # by the pipelines' argument rng
