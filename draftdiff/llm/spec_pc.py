"""SpecPC: shorten a prompt to the tokens that a draft model attends to (arXiv 2506.08373, section 5).

The target then reads those tokens alone, numbered anew. Lossy; needs nothing of the target but its vocabulary, so that
the shortened prompt can go to any server.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from draftdiff.core.importance import importance_order, smooth
from draftdiff.llm.checks import check_prompt, require, vocabulary_size
from draftdiff.llm.observe import AttentionCall, observing
from draftdiff.llm.pair import lookahead


@dataclass(frozen=True)
class SpecPCConfig:
    """What to keep, and which of the draft's attention counts.

    capacity: tokens that stay.  window: the last of them, kept in any case, whose queries count, later ones for more.
    kernel: tokens over which importance spreads, and that are kept around an important one; the authors take 64 for
    Qwen and 32 for Llama.  start: the first layer that counts, as a share of the draft's depth; the authors' is layer 8
    of 24. Where layers of full attention are among those that count, they count alone.  lookahead: queries of the
    draft's own tokens count too, all but the last of so many; 1 is the prompt alone.
    """

    capacity: int = 2048
    window: int = 64
    kernel: int = 32
    start: float = 1 / 3
    lookahead: int = 1

    def __post_init__(self) -> None:
        for name in ("window", "kernel", "lookahead"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        require(
            self.capacity >= self.window, f"capacity must be at least the window of {self.window}, got {self.capacity}"
        )
        require(0 <= self.start < 1, f"start must be a share of the depth, at least 0 and below 1, got {self.start}")


def specpc(
    draft: PreTrainedModel, ids: Tensor, config: SpecPCConfig | None = None, *, attention_mask: Tensor | None = None
) -> Tensor | list[Tensor]:
    """Which tokens of a prompt to keep: int64 [kept], ascending, ids[:, keep] is the shorter prompt.

    ids: int64 [1, tokens]. With more rows the result is a list with one such tensor per row, all indices into the
    padded row and none of padding.  attention_mask: like ids, 0 for padding on the left.
    A row of no more tokens than the capacity is kept whole. Raises ValueError for an empty prompt, ids out of the
    draft's vocabulary, and padding on the right.
    """
    config = config or SpecPCConfig()
    mask = check_prompt(draft, ids, attention_mask)
    if int(mask.sum(-1).max()) <= config.capacity:
        rows = [row.nonzero()[:, 0] for row in mask]
    else:
        rows = observed(draft, ids, mask, config, vocabulary_size(draft))[0]
    return rows[0] if len(rows) == 1 else rows


def observed(
    draft: PreTrainedModel, ids: Tensor, attention_mask: Tensor, config: SpecPCConfig, size: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """What to keep of each row, and the draft's continuation as `lookahead` gives it, within a vocabulary of `size`."""
    observer = _TokenScores(draft, attention_mask, config)
    with observing(draft, observer):
        ahead, valid = lookahead(draft, ids, attention_mask, config.lookahead, size)
    scores = observer.scores(valid)
    chosen = []
    for row, mask in zip(scores, attention_mask):
        first = int(mask.argmax())
        chosen.append(select_tokens(row[first:], config) + first)
    return chosen, ahead, valid


class _TokenScores:
    """The observer: for each forward, the most attention that a prompt token gets in any layer, head and query."""

    def __init__(self, draft: PreTrainedModel, attention_mask: Tensor, config: SpecPCConfig) -> None:
        self.config = config
        self.attention_mask = attention_mask
        self.layers = counted_layers(draft, config.start)
        self.forwards: dict[int, Tensor] = {}  # by tokens read so far: fp32 [batch, prompt tokens]
        self._read: dict[int, int] = {}  # tokens by layer

    def __call__(self, call: AttentionCall) -> None:
        if call.layer not in self.layers:
            return
        read = self._read[call.layer] = self._read.get(call.layer, 0) + call.query.shape[2]
        prompt = self.attention_mask.shape[1]
        if read < prompt:
            return  # a chunk of the prompt: its last one has the window
        rows = min(self.config.window, call.query.shape[2])
        weights = torch.ones(1, device=call.query.device)
        if read == prompt and rows > 1:
            weights = torch.linspace(0, 1, rows, device=weights.device)
        most = call.mass(rows, weights=weights, reduce="max").amax(1).to(self.attention_mask.device)
        start = read - call.key.shape[2]  # a sliding layer holds the last keys only
        scores = self.forwards.setdefault(read, most.new_zeros(self.attention_mask.shape))
        if start < prompt:
            seen = scores[:, start:]
            seen.copy_(torch.maximum(seen, most[:, : prompt - start]))

    def scores(self, valid: Tensor) -> Tensor:
        """Most over the forwards, fp32 [batch, prompt tokens]. A draft's token that is not `valid` does not count."""
        steps = [self.forwards[read] for read in sorted(self.forwards)]
        counted = [steps[0]] + [step * alive[:, None] for step, alive in zip(steps[1:], valid.T)]
        return torch.stack(counted).amax(0)


def counted_layers(draft: PreTrainedModel, start: float) -> set[int]:
    """The layers whose attention counts: from `start` on, and of those the ones of full attention if there are any, as
    a layer that slides over a window finds the end of the prompt important, whatever it says."""
    config = draft.config.get_text_config(decoder=True)
    late = range(math.floor(start * config.num_hidden_layers), config.num_hidden_layers)
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return {layer for layer in late if types[layer] == "full_attention"} or set(late)


def select_tokens(scores: Tensor, config: SpecPCConfig) -> Tensor:
    """The tokens to keep of one prompt by their importance, int64 [min(capacity, tokens)], ascending.

    scores: fp32 [tokens].  In order, and without repeats, until the capacity is full: the window, then the tokens by
    importance (pooled over `kernel`; of equals the one that scores more, then the first), each with its neighbours,
    nearest first, left before right.
    """
    tokens, kernel = len(scores), config.kernel
    if tokens <= config.capacity:
        return torch.arange(tokens, device=scores.device)
    pooled = smooth(scores[None], kernel, "max")[0]
    best = importance_order(pooled, scores)[: config.capacity]
    offsets = sorted(range(-((kernel - 1) // 2), kernel // 2 + 1), key=lambda offset: (abs(offset), offset))
    around = (best[:, None] + torch.tensor(offsets, device=best.device)).flatten()
    around = around[(around >= 0) & (around < tokens)]
    order = torch.cat([torch.arange(tokens - config.window, tokens, device=best.device), around])
    place = torch.arange(len(order), device=best.device)
    first_place = order.new_full((tokens,), len(order)).scatter_reduce(0, order, place, "amin")
    return first_place.argsort(stable=True)[: config.capacity].sort().values
