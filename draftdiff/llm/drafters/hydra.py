"""Drafts from Hydra and Hydra++ heads (arXiv 2402.05109), each of which reads the tokens drafted so far."""

from __future__ import annotations

from dataclasses import dataclass

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
        self._plan: list[_Level] = []

    def begin(self, context: Context) -> None:
        super().begin(context)
        self._prefix = None if self.heads.prefix is None else Follower(self.heads.prefix)
        self._plan = _plan(self.tree, context.target.model.device)

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
        read = torch.cat([states, embed(last).to(states.dtype)], dim=-1)[:, None]  # one line, for the root
        found: list[Tensor] = []
        for head, level in enumerate(self._plan[:depth]):
            if head:
                drafted = embed(found[-1].index_select(1, level.nodes)).to(states.dtype)
                read = torch.cat([read.index_select(1, level.lines), drafted], dim=-1)
            best = self.heads.guess(head, read).topk(level.width).indices
            found.append(best.flatten(1).index_select(1, level.picked))
        return torch.cat(found, dim=1)


@dataclass(frozen=True)
class _Level:
    """How a level of a tree is drafted from the one above it.

    What a head reads has a line for each node that has children. nodes: which of the level above those are.  lines: on
    which lines those nodes themselves were drafted.  width: guesses of a line.  picked: which guesses are in the tree,
    of all lines' in a row.
    """

    nodes: Tensor
    lines: Tensor
    width: int
    picked: Tensor


def _plan(tree: StaticTree, device: torch.device) -> list[_Level]:
    """How each level is drafted, as indices on a device."""
    plan, before = [], {ROOT: 0}  # lines of the nodes with children, so far those of the level above
    for depth, level in enumerate(tree.levels):
        inner = sorted({tree.parents[node] for node in level})
        lines = {node: line for line, node in enumerate(inner)}
        width = max(tree.paths[node][-1] for node in level) + 1
        start = tree.levels[depth - 1].start if depth else ROOT
        index = (
            [node - start for node in inner],
            [before[tree.parents[node]] if depth else 0 for node in inner],
            [lines[tree.parents[node]] * width + tree.paths[node][-1] for node in level],
        )
        nodes, above, picked = (torch.tensor(one, device=device) for one in index)
        plan.append(_Level(nodes, above, width, picked))
        before = lines
    return plan
