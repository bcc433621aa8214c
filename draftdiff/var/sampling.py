"""Drawing tokens from logits: top-k and top-p filters, categorical and Gumbel-softmax draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor


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


def exponential(shape: Sequence[int], generator: Generator | Sequence[Generator] | None, like: Tensor) -> Tensor:
    """Unit exponential noise [batch, ...] on the device of `like`, drawn on the generator's own device; from a list of
    generators each item of the batch is drawn alone."""
    if isinstance(generator, Sequence):
        return torch.cat([exponential((1, *shape[1:]), one, like) for one in generator])
    device = like.device if generator is None else generator.device
    noise = torch.empty(tuple(shape), dtype=torch.float32, device=device)
    return noise.exponential_(1, generator=generator).to(like.device)


def draw(logits: Tensor, generator: Generator | Sequence[Generator] | None) -> Tensor:
    """Draw an index from each row of logits [batch, tokens, vocabulary]; returns int64 [batch, tokens].

    On a CPU these are the draws of torch.multinomial on the [batch * tokens, vocabulary] probabilities.
    """
    probabilities = logits.float().softmax(-1)
    return (probabilities / exponential(logits.shape, generator, logits)).argmax(-1)


def draw_soft(logits: Tensor, temperature: float, generator: Generator | Sequence[Generator] | None) -> Tensor:
    """Gumbel-softmax weights, fp32 of the shape of logits (arXiv 1611.01144, Eq. 2)."""
    gumbel = -exponential(logits.shape, generator, logits).log()
    return ((logits.float() + gumbel) / temperature).softmax(-1)
