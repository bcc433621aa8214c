"""What a drafter has to offer, and what it is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from draftdiff.llm.decoder import TreeDecoder
from draftdiff.llm.tree import Tree


@dataclass
class Context:
    """The state of a generation before a round. Lists have one entry per row of the batch.

    target: the target model with its cache; the last token of each row is not in it yet.
    ids: tokens so far with their padding, int64 [1, tokens], views that grow.  padding: how many of them are padding.
    room: most drafted tokens that may still be accepted, -1 for a finished row.
    processors, sampling: how the target's logits become a row's next token.
    trees, paths: last round's proposals and which of their nodes were accepted; empty in the first round.
    hidden: if the drafter reads hidden states, the target's last ones [accepted + 1, width] of the token that was fed
    first and the accepted nodes of last round; None in the first round.
    """

    target: TreeDecoder
    ids: list[Tensor]
    padding: list[int]
    room: list[int]
    processors: list[LogitsProcessorList]
    sampling: bool
    trees: list[Tree] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)
    hidden: list[Tensor] | None = None

    def distribution(self, row: int, suffixes: list[list[int]], logits: Tensor) -> Tensor:
        """What the processors make of logits [n, vocabulary] after the row's tokens and n equally long suffixes.

        Probabilities, fp32 [n, vocabulary].
        """
        if self.processors[row]:
            ids = self.ids[row].expand(len(suffixes), -1)
            if suffixes[0]:
                ids = torch.cat([ids, torch.tensor(suffixes, device=ids.device)], dim=1)
            logits = self.processors[row](ids, logits.float())
        return logits.softmax(-1, dtype=torch.float32)


class Drafter(Protocol):
    """Proposes tokens. A generation starts with `begin` and ends with `end`, also by an exception.

    reads_hidden_states: the target then returns them (`Context.hidden`).  forwards: draft forwards of this generation.
    cost: bytes that a draft forward reads over those of a target forward, 0 for a drafter without a model.
    """

    reads_hidden_states: bool
    forwards: int

    def begin(self, context: Context) -> None:
        """Prepare for a new generation. Raises ValueError if it cannot draft for this target."""

    def propose(self, context: Context) -> list[Tree]:
        """One tree for each row, no deeper than its room; an empty one where nothing is to be proposed."""

    def end(self) -> None:
        """Let go of what only this generation needed, such as a cache."""

    def cost(self, target: Any) -> float:
        """Bytes of weights that one draft forward reads over those of a target forward."""


def vocabulary_size(model: Any) -> int:
    """Rows of the model's output."""
    return int(model.config.get_text_config().vocab_size)


def check_vocabulary_sizes(target: PreTrainedModel, draft: PreTrainedModel) -> int:
    """The target's vocabulary size. Raises ValueError unless draft and target share a vocabulary.

    Sizes may differ by padding: both multiples of 64 less than 1,024 apart, as among the sizes of one family.
    """
    a, b = vocabulary_size(target), vocabulary_size(draft)
    if a != b and (a % 64 or b % 64 or abs(a - b) >= 1024):
        raise ValueError(
            f"the draft's vocabulary of {b} tokens is not the target's of {a}: they need the same tokenizer"
        )
    return a


def check_vocabularies(target: PreTrainedModel, draft: PreTrainedModel) -> int:
    """As `check_vocabulary_sizes`, and raises ValueError unless both are on one device."""
    size = check_vocabulary_sizes(target, draft)
    if target.device != draft.device:
        raise ValueError(f"the draft is on {draft.device}, the target on {target.device}: they need the same device")
    return size
