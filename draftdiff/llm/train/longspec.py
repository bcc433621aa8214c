"""Training a LongSpec layer (arXiv 2502.17421) on the keys of its frozen target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from draftdiff.hosts.transformers import cache_argument
from draftdiff.llm.checks import require
from draftdiff.llm.train.heads import HeadsTrainer
from draftdiff.llm.train.losses import Loss


class LongSpecTrainer(HeadsTrainer):
    """A DraftTrainer whose model is a `LongSpecHead`: the target runs on every batch and lends its last layer's keys.

    While drafting the keys are behind the draft by as many tokens as were drafted. So in training they are behind by a
    lag that is drawn for each batch, from 1 to `most_lag`; in evaluation by 1. With `data_collator=AnchorOffset(...)`
    short rows stand at far positions, too.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        target: Any,
        loss: str | Loss = "ce",
        most_lag: int = 4,
        **kwargs: Any,
    ) -> None:
        """As HeadsTrainer's. most_lag: tokens that will be drafted at most, or about as many."""
        require(most_lag >= 1, f"most_lag must be at least 1, got {most_lag}")
        self.most_lag = most_lag
        super().__init__(model, args, target=target, loss=loss, **kwargs)

    def ahead(self, model: Any) -> list[int]:
        """One guess of the next token."""
        return [1]

    def run(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Any, list[tuple[int, Tensor]], Any]:
        """The target's forward, then the layer's on its keys."""
        ids, mask, positions = inputs["input_ids"], inputs["attention_mask"], inputs.get("position_ids")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        keys, values, target_logits = read_keys(self.target, ids, mask, positions)
        lag = int(torch.randint(1, self.most_lag + 1, ())) if model.training else 1
        logits = self.model.logits(model(ids, positions, keys, values, lag))
        return CausalLMOutput(logits=logits), [(1, logits)], lambda rows: target_logits[rows]


@torch.no_grad()
def read_keys(target: Any, ids: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values [rows, key heads, tokens, head_dim] of the last layer and logits [rows, tokens, vocabulary] of a
    batch, on its device."""
    there = target.device
    cache = DynamicCache()  # without a config, so that layers that slide over a window keep all
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    output = target(
        **{name: x.to(there) for name, x in given.items()}, use_cache=True, **{cache_argument(target): cache}
    )
    last = cache.layers[-1]
    return last.keys.to(ids.device), last.values.to(ids.device), output.logits.to(ids.device)
