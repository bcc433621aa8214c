"""What a drafter has to offer, and what it is told."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from draftdiff.llm.decoder import TreeDecoder
from draftdiff.llm.reporting import Report
from draftdiff.llm.tree import Tree


@dataclass(frozen=True)
class Reads:
    """Which of the target's hidden states a drafter reads, and whether its logits.

    layers: i is what layer i of the target is fed, -1 what leaves the norm after the last one; none by default.
    prompt: those of the whole prompt, which must then not be in a cache already; else the last one of it that is fed.
    """

    layers: tuple[int, ...] = ()
    prompt: bool = False
    logits: bool = False


@dataclass(frozen=True)
class Context:
    """The state of a generation before a round. Lists have one entry per row of the batch.

    target: the target model with its cache; the last token of each row is not in it yet. Its `states` are the hidden
    states that the drafter `reads` of what was committed last: first of the prompt without its last token, then of the
    token that was fed first and of last round's accepted nodes; `committed` are keys and values of any layer. padding:
    how many tokens of a row are padding. processors, sampling: how logits become a row's next token, as far as drafts
    may know; see `processors.for_drafts`. ids: tokens so far with their padding, int64 [1, tokens], views that grow.
    room: most drafted tokens that may be accepted in this round, 0 where drafts do not pay, -1 for a finished row.
    trees, paths: last round's proposals and which of their nodes were accepted; empty in the first round. logits: if
    the drafter reads them, the target's [accepted + 1, vocabulary] after the token that was fed first and last round's
    accepted nodes, unprocessed; None in the first round.
    """

    target: TreeDecoder
    padding: list[int]
    processors: list[LogitsProcessorList]
    sampling: bool
    ids: list[Tensor]
    room: list[int]
    trees: list[Tree] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)
    logits: list[Tensor] | None = None

    def next_round(
        self,
        ids: list[Tensor],
        room: list[int],
        trees: list[Tree],
        paths: list[list[int]],
        logits: list[Tensor] | None = None,
    ) -> Context:
        """The state after a round, in whose trees these paths were accepted."""
        return replace(self, ids=ids, room=room, trees=trees, paths=paths, logits=logits)

    def distribution(self, row: int, suffixes: list[list[int]], logits: Tensor) -> Tensor:
        """What the processors make of logits [n, vocabulary] after the row's tokens and n equally long suffixes.

        Probabilities, fp32 [n, vocabulary], where the logits are; with processors where the target is.
        """
        if self.processors[row]:
            logits = logits.to(self.ids[row].device)
            ids = self.ids[row].expand(len(suffixes), -1)
            if suffixes[0]:
                ids = torch.cat([ids, torch.tensor(suffixes, device=ids.device)], dim=1)
            logits = self.processors[row](ids, logits.float())
        return logits.softmax(-1, dtype=torch.float32)


class Drafter(Protocol):
    """Proposes tokens. A generation starts with `begin` and ends with `end`, also by an exception. Where it serves
    another generation meanwhile, it is a shallow copy that does: what `begin` sets belongs to one generation, what is
    changed in place to all.

    reads: hidden states of the target, which then returns them (`Context.target.states`), or its logits.  forwards:
    draft forwards of this generation.  last_report: what the last generation did, which sets it; None before the first.

    It may have more. samples (True if absent): whether drafts are drawn at random when the target samples.  whole
    (False if absent): whether the length of drafts is its own affair.
    beside(context): called with the round's context when the target is about to be fed, to draft meanwhile; returns a
    function that waits for it, and then may add to each proposed tree one node, which the target has not been fed.
    """

    reads: Reads
    forwards: int
    last_report: Report | None

    def begin(self, context: Context) -> None:
        """Prepare for a new generation. Raises ValueError if it cannot draft for this target."""

    def propose(self, context: Context) -> list[Tree]:
        """One tree for each row, no deeper than its room; an empty one where nothing is to be proposed."""

    def end(self) -> None:
        """Let go of what only this generation needed, such as a cache."""

    def cost(self, target: Any) -> float:
        """Bytes of weights that one draft forward reads over those of a target forward, 0 without a model."""


def suffixes(context: Context, tree: Tree, nodes: list[int]) -> list[list[int]]:
    """The drafted tokens down to each node, where somebody wants to know them."""
    return [[tree.tokens[n] for n in tree.path(node)] for node in nodes] if any(context.processors) else []
