"""Training draft heads on their target's hidden states, and how far their guesses are right by rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from draftdiff.errors import UserError
from draftdiff.llm.train.data import DistillationSet, collate
from draftdiff.llm.train.losses import Loss
from draftdiff.llm.train.modes import in_eval_mode
from draftdiff.llm.train.trainer import DraftTrainer


class HeadsTrainer(DraftTrainer):
    """A DraftTrainer whose model is `HydraHeads` or `MedusaHeads`: the target, which is frozen, runs on every batch.

    Head i at a position is compared with the target i + 1 tokens further on (its law where the loss compares with one,
    else the token of the text after that). The loss is the sum over the heads of each one's mean.

        Hydra (arXiv 2402.05109):  loss="ce"
        Hydra++:                   loss="kl" on rows with `distil`, its teacher loss less the target's entropy
    """

    def __init__(
        self, model: Any, args: TrainingArguments, *, target: Any, loss: str | Loss = "kl", **kwargs: Any
    ) -> None:
        """As DraftTrainer's. Raises ValueError for heads of another target, too."""
        target.requires_grad_(False)  # its output layer may be that of the heads
        super().__init__(model, args, target=target, loss=loss, **kwargs)

    def check(self, model: Any) -> int:
        """The token to pad rows with. Raises ValueError for heads of another target."""
        model.target.check_target(self.target)
        return max(0, self.target.config.get_text_config().pad_token_id or 0)

    def ahead(self, model: Any) -> list[int]:
        """How many steps ahead each head guesses."""
        return [head + 2 for head in range(model.settings.heads)]

    def run(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Any, list[tuple[int, Tensor]], Any]:
        """The target's forward, then the heads on its last hidden states."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        positions = inputs.get("position_ids")
        hidden, logits = read_target(self.target, ids, mask, positions)
        found = model(hidden, ids, mask, positions)
        return found, list(zip(self.ahead(self.model), found)), lambda rows: logits[rows]


@torch.no_grad()
def read_target(target: Any, ids: Tensor, mask: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Last hidden states and logits of a batch, [rows, tokens, ...], on its device. positions: other than those that
    follow from the mask, int64 [rows, tokens]."""
    there = target.device
    given = {"input_ids": ids.to(there), "attention_mask": mask.to(there)}
    if positions is not None:
        given["position_ids"] = positions.to(there)
    output = target(**given, use_cache=False, output_hidden_states=True)
    return output.hidden_states[-1].to(ids.device), output.logits.to(ids.device)


@torch.no_grad()
def rank_acceptance(
    heads: Any, target: Any, dataset: DistillationSet, *, ranks: int = 10, batch_size: int = 8
) -> Tensor:
    """How often the token at each depth is a head's guess of each rank, fp32 [heads, ranks], where all tokens before it
    were right: what `StaticTree.learned` grows a tree from, and what greedy speculation with it reaches on text that
    the target wrote greedily.

    Counted over the `written` positions of a dataset. Raises ValueError if a head has none there.
    """
    right = torch.zeros(heads.settings.heads, ranks)
    counts = torch.zeros(heads.settings.heads)
    with in_eval_mode(target, heads):
        for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=collate):
            ids = batch["input_ids"].to(target.device)
            hidden, _ = read_target(target, ids, batch["attention_mask"])
            for head, logits in enumerate(heads(hidden, ids, batch["attention_mask"].to(ids.device))):
                counted = batch["written"][:, head + 2 :]
                best = logits[:, : counted.shape[1]].topk(ranks).indices
                hits = (best == ids[:, head + 2 :, None]).cpu()
                right[head] += hits[counted].sum(0)
                counts[head] += counted.sum()
    if not counts.all():
        raise UserError(
            f"dataset must have written tokens {heads.settings.heads + 1} after the first of a row, got none"
        )
    return right / counts[:, None]
