"""Drafts from Medusa heads (arXiv 2401.10774), each of which guesses from the last hidden state alone."""

from __future__ import annotations

import torch
from torch import Tensor

from draftdiff.llm.drafters.ranked import RankedDrafter
from draftdiff.llm.heads.medusa import MedusaHeads


class MedusaDrafter(RankedDrafter):
    """Trees of the heads' likeliest tokens, whatever stands before them in the tree.

    heads: `MedusaHeads` on the target's device.  tree: no deeper than there are heads.
    """

    kind, module = "medusa", MedusaHeads

    def tokens(self, states: Tensor, last: Tensor, depth: int) -> Tensor:
        found = []
        for head, level in enumerate(self.tree.levels[:depth]):
            ranks = [self.tree.paths[node][-1] for node in level]
            best = self.heads.guess(head, states).topk(max(ranks) + 1).indices
            found.append(best[:, ranks])
        return torch.cat(found, dim=1)
