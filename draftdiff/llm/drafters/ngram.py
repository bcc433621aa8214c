"""Drafts without a model, from what followed the last two tokens before (ADED, arXiv 2407.12021).

A tree of continuations is searched in a tri-gram table: by the paper's Monte-Carlo tree search (see `puct`), or best
first by the product of shares. The table learns while decoding.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from itertools import count
from typing import Any

from draftdiff.llm.checks import require
from draftdiff.llm.drafters.base import Context, Reads
from draftdiff.llm.drafters.ngram_table import NGramTable, check_table
from draftdiff.llm.drafters.puct import puct
from draftdiff.llm.reporting import Report
from draftdiff.llm.tree import ROOT, Tree

SEARCHES = ("best_first", "puct")


class NGramDrafter:
    """Drafts from a tri-gram table, on the host, in about a millisecond.

    table: what is known already; a new one learns from the prompt and while decoding, and stays for later generations.
    search: "best_first" or "puct".  depth: most tokens of a path.  nodes: most drafted tokens of a round.
    iterations, seed: of PUCT.
    """

    reads = Reads()
    samples = False

    def __init__(
        self,
        table: NGramTable | None = None,
        *,
        search: str = "best_first",
        depth: int = 5,
        nodes: int = 64,
        iterations: int = 150,
        seed: int = 0,
    ) -> None:
        require(search in SEARCHES, f"search must be one of {', '.join(SEARCHES)}, got {search!r}")
        for name, value in (("depth", depth), ("nodes", nodes), ("iterations", iterations)):
            require(value >= 1, f"{name} must be at least 1, got {value}")
        self.table = NGramTable() if table is None else table
        self.search, self.depth, self.nodes, self.iterations = search, depth, nodes, iterations
        self.forwards = 0
        self.last_report: Report | None = None
        self._random = random.Random(seed)

    def cost(self, target: Any) -> float:
        """No model is read."""
        return 0.0

    def begin(self, context: Context) -> None:
        """Learn from the prompts. Raises ValueError if the table is of another vocabulary."""
        check_table(self.table, context.target.model)
        for ids, padding in zip(context.ids, context.padding):
            self.table.learn_prompt(ids[0, padding:].tolist())

    def propose(self, context: Context) -> list[Tree]:
        """One tree for each row."""
        if context.trees:
            for ids, padding, left in zip(context.ids, context.padding, context.room):
                if left >= 0:
                    self.table.learn_step(ids[0, max(padding, ids.shape[1] - self.table.window) :].tolist())
        # A padding token can only stand in the pair if the prompt was one token, and then nothing follows it.
        return [self.tree(ids[0, -2:].tolist(), min(self.depth, left)) for ids, left in zip(context.ids, context.room)]

    def end(self) -> None:
        """The table stays: what it learned serves the next generation."""

    def tree(self, last: Sequence[int], depth: int) -> Tree:
        """Continuations of the last two tokens, at most `depth` long."""
        if len(last) < 2 or depth < 1:
            return Tree()
        if self.search == "best_first":
            return _best_first(self.table, last, depth, self.nodes)
        return puct(self.table, last, depth, self.nodes, self.iterations, self._random.random)


def _best_first(table: NGramTable, last: Sequence[int], depth: int, nodes: int) -> Tree:
    """The likeliest paths, by the product of each token's share of the weights after its pair."""
    tree, arrival = Tree(), count()
    # (-share of the path, order of arrival, parent, token, token before, depth)
    queue: list[tuple[float, int, int, int, int, int]] = []

    def push(parent: int, share: float, a: int, b: int, level: int) -> None:
        found = table.follow(a, b)
        total = sum(weight for weight, _ in found)
        for weight, token in found:
            heapq.heappush(queue, (-share * weight / total, next(arrival), parent, token, b, level))

    push(ROOT, 1.0, last[0], last[1], 1)
    while queue and len(tree.tokens) < nodes:
        share, _, parent, token, before, level = heapq.heappop(queue)
        node = tree.add(parent, token)
        if level < depth:
            push(node, -share, before, token, level + 1)
    return tree
