"""Drawing tokens from logits: top-k and top-p filters, categorical and Gumbel-softmax draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

Generators = Generator | Sequence[Generator] | None


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


def exponential(shape: Sequence[int], generator: Generators, like: Tensor) -> Tensor:
    """Unit exponential noise fp32 [batch, ...]; see `_noise`."""
    return _noise(shape, generator, like, lambda noise, one: noise.exponential_(1, generator=one))


def uniform(shape: Sequence[int], generator: Generators, like: Tensor) -> Tensor:
    """Uniform noise in [0, 1), fp32 [batch, ...]; see `_noise`."""
    return _noise(shape, generator, like, lambda noise, one: noise.uniform_(generator=one))


def _noise(shape: Sequence[int], generator: Generators, like: Tensor, fill: Callable[..., Tensor]) -> Tensor:
    """Noise on the device of `like`, drawn on the generator's own device; from a list of generators each item of the
    batch is drawn alone."""
    if isinstance(generator, Sequence):
        return torch.cat([_noise((1, *shape[1:]), one, like, fill) for one in generator])
    device = like.device if generator is None else generator.device
    return fill(torch.empty(tuple(shape), dtype=torch.float32, device=device), generator).to(like.device)


def draw(logits: Tensor, generator: Generators) -> Tensor:
    """Draw an index from each row of logits [batch, tokens, vocabulary]; returns int64 [batch, tokens].

    On a CPU these are the draws of torch.multinomial on the [batch * tokens, vocabulary] probabilities.
    """
    probabilities = logits.float().softmax(-1)
    return (probabilities / exponential(logits.shape, generator, logits)).argmax(-1)


def draw_soft(logits: Tensor, temperature: float, generator: Generators) -> Tensor:
    """Gumbel-softmax weights, fp32 of the shape of logits (arXiv 1611.01144, Eq. 2)."""
    gumbel = -exponential(logits.shape, generator, logits).log()
    return ((logits.float() + gumbel) / temperature).softmax(-1)
