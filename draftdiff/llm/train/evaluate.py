"""How well a draft matches its target on text, from one forward of each: no decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from draftdiff.errors import UserError
from draftdiff.llm.checks import check_vocabulary_sizes, vocabulary_size
from draftdiff.llm.metrics import acceptance_rate
from draftdiff.llm.train.data import DistillationSet, collate
from draftdiff.llm.train.modes import in_eval_mode


@dataclass(frozen=True)
class DraftScores:
    """acceptance: chance that a token drafted at temperature 1 is accepted, the mean of sum min(p, q).  agreement:
    share of positions where the draft's likeliest token is the one in the text.  block_efficiency: tokens per target
    forward of chains of `length` greedy drafts, each chain ended by a token of the target's.

    On text that the target wrote greedily agreement and block_efficiency are exactly what greedy speculation reaches.
    """

    acceptance: float
    agreement: float
    block_efficiency: float
    length: int
    tokens: int


@torch.no_grad()
def evaluate_draft(
    target: Any, draft: Any, dataset: DistillationSet, *, length: int = 4, batch_size: int = 8, progress: bool = True
) -> DraftScores:
    """Scores of a draft over the `written` positions of a dataset.

    Raises ValueError if there are none, and for a draft of another vocabulary.
    """
    width = min(check_vocabulary_sizes(target, draft), vocabulary_size(draft))  # they may be padded differently
    accepted, agreed, tokens, rounds = 0.0, 0, 0, 0
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate)
    with in_eval_mode(target, draft):
        for batch in tqdm(loader, unit="batch", leave=False, disable=not progress):
            ids, mask = batch["input_ids"], batch["attention_mask"]
            p, q = (
                model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
                .logits[:, :-1, :width]
                .float()
                .softmax(-1)
                .cpu()
                for model in (target, draft)
            )
            counted = batch["written"][:, 1:]
            right = q.argmax(-1) == ids[:, 1:]
            accepted += acceptance_rate(p, q)[counted].sum().item()
            agreed += int(right[counted].sum())
            tokens += int(counted.sum())
            rounds += sum(chain_rounds(row[which], length) for row, which in zip(right, counted))
    if not tokens:
        raise UserError("dataset must have written tokens after the first of a row, got none")
    return DraftScores(accepted / tokens, agreed / tokens, tokens / rounds, length, tokens)


def chain_rounds(right: Tensor, length: int) -> int:
    """Target forwards that greedy chains of `length` drafts take, where bool [tokens] says which would be right."""
    rounds, run = 0, 0
    for hit in right.tolist():
        # A chain goes on while drafts are right; the token after it is the target's own and ends the round.
        if hit and run < length:
            run += 1
        else:
            rounds, run = rounds + 1, 0
    return rounds + (run > 0)
