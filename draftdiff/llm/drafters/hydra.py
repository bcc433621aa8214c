"""Drafts from Hydra and Hydra++ heads (arXiv 2402.05109), each of which reads the tokens drafted so far."""

from __future__ import annotations

import torch
from torch import Tensor

from draftdiff.llm.drafters.base import Context, Reads
from draftdiff.llm.drafters.follower import Follower
from draftdiff.llm.drafters.ranked import RankedDrafter
from draftdiff.llm.heads.hydra import HydraHeads
from draftdiff.llm.static_tree import StaticTree
from draftdiff.llm.tree import ROOT


class HydraDrafter(RankedDrafter):
    """Trees of each head's likeliest tokens after the path that leads to them.

    heads: `HydraHeads` on the target's device; with a prefix layer they read the states of the whole prompt.  tree: no
    deeper than there are heads. Trained by `HeadsTrainer`; `StaticTree.learned` makes a tree to fit.
    """

    kind, module = "hydra", HydraHeads

    def __init__(self, heads: HydraHeads, tree: StaticTree | None = None) -> None:
        super().__init__(heads, tree)
        if heads.prefix is not None:
            self.reads = Reads((-1,), prompt=True)
        self._prefix: Follower | None = None

    def begin(self, context: Context) -> None:
        super().begin(context)
        self._prefix = None if self.heads.prefix is None else Follower(self.heads.prefix)

    def end(self) -> None:
        """Let the prefix layer's cache go."""
        self._prefix = None

    def states(self, context: Context) -> tuple[Tensor, list[bool]]:
        states, known = super().states(context)
        if self._prefix is None:
            return states, known
        output = self._prefix.catch_up(context)
        if output is None:
            return states, known
        last = [max(count - 1, 0) for count in self._prefix.known]
        return output.last_hidden_state[torch.arange(len(last)), last], known

    def tokens(self, states: Tensor, last: Tensor, depth: int) -> Tensor:
        embed = self.heads.target.embed
        read = torch.cat([states, embed(last).to(states.dtype)], dim=-1)[:, None]  # one row for the root
        places = {ROOT: 0}  # of nodes whose children are drafted next, in `read`
        found = []
        for head, level in enumerate(self.tree.levels[:depth]):
            ranks = [self.tree.paths[node][-1] for node in level]
            above = [places[self.tree.parents[node]] for node in level]
            best = self.heads.guess(head, read).topk(max(ranks) + 1).indices
            found.append(best[:, above, ranks])
            if head + 1 < depth:
                following = self.tree.levels[head + 1]
                inner = sorted({self.tree.parents[node] for node in following})
                places = {node: place for place, node in enumerate(inner)}
                which = [node - level.start for node in inner]
                chosen = embed(found[-1][:, which]).to(states.dtype)
                read = torch.cat([read[:, [above[place] for place in which]], chosen], dim=-1)
        return torch.cat(found, dim=1)
