"""The Monte-Carlo tree search of ADED (arXiv 2407.12021): PUCT balances likely branches against unvisited ones."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Sequence
from itertools import accumulate

from draftdiff.llm.drafters.ngram_table import NGramTable
from draftdiff.llm.tree import ROOT, Tree

_PATHS = 24  # most visited paths that are proposed
_C1, _C2 = 32.0, 8.0  # exploration, section 3.3


class _Followers(dict[tuple[int, int], tuple[list[tuple[float, int]], list[float]]]):
    """What follows the pairs that one search meets, with running sums of the weights."""

    def __init__(self, table: NGramTable) -> None:
        self._table = table

    def __missing__(self, pair: tuple[int, int]) -> tuple[list[tuple[float, int]], list[float]]:
        found = self._table.follow(*pair)
        self[pair] = found, list(accumulate(weight for weight, _ in found))
        return self[pair]


class _Node:
    """A place in the search. `prior` is its weight in the table, `reward` the sum over its `visits`.

    followers: what may follow, the heaviest first; None until expanded.  children: those of them that were visited.
    """

    __slots__ = ("children", "followers", "prior", "reward", "token", "visits")

    def __init__(self, token: int, prior: float) -> None:
        self.token, self.prior = token, prior
        self.visits, self.reward = 0, 0.0
        self.followers: list[tuple[float, int]] | None = None
        self.children: list[_Node] = []

    def select(self) -> _Node:
        """The child of the largest reward and exploration. Of the unvisited ones that is the heaviest, and only it."""
        children, followers = self.children, self.followers
        scale = (_C1 + math.log((self.visits + _C2 + 1) / _C2)) * math.sqrt(self.visits)
        best, most = None, -1.0
        for child in children:
            score = child.reward / child.visits + scale * child.prior / (1 + child.visits)
            if score > most:
                best, most = child, score
        if followers is not None and len(children) < len(followers):
            prior, token = followers[len(children)]
            if best is None or scale * prior > most:
                best = _Node(token, prior)
                children.append(best)
        assert best is not None
        return best


def puct(
    table: NGramTable,
    last: Sequence[int],
    depth: int,
    nodes: int,
    iterations: int,
    uniform: Callable[[], float],
) -> Tree:
    """Paths of `depth` - 1 tokens ranked by visits, each extended by its heaviest successor.

    last: the two tokens to continue.  nodes: most that are proposed.  uniform: draws from [0, 1).
    """
    known = _Followers(table)
    root = _Node(last[1], 0.0)
    root.followers = known[last[0], last[1]][0]
    if not root.followers:
        return Tree()
    length = max(depth - 1, 1)
    for _ in range(iterations):
        path, before = [root], last[0]
        node = root
        while len(path) <= length and node.followers:
            before = node.token
            node = node.select()
            path.append(node)
        if node.followers is None and len(path) <= length:
            node.followers = known[before, node.token][0]
        reward = 1 + sum(one.prior for one in path)
        a, b = before, node.token
        for _ in range(length + 1 - len(path)):
            found, sums = known[a, b]
            if not found:
                break
            weight, token = found[bisect(sums, uniform() * sums[-1], hi=len(sums) - 1)]
            reward += weight
            a, b = b, token
        for one in path:
            one.visits += 1
            one.reward += reward
    return _most_visited(table, root, last[0], depth, nodes)


def _most_visited(table: NGramTable, root: _Node, before: int, depth: int, nodes: int) -> Tree:
    ends: list[tuple[int, list[int]]] = []
    stack = [(root, [before, root.token])]
    while stack:
        node, tokens = stack.pop()
        stack += [(child, [*tokens, child.token]) for child in node.children]
        if not node.children:
            ends.append((node.visits, tokens))
    ends.sort(key=lambda end: -end[0])
    tree = Tree()
    for _, tokens in ends[:_PATHS]:
        found = table.follow(tokens[-2], tokens[-1])
        path = [*tokens[2:], *([found[0][1]] if found else [])][:depth]
        node_of = ROOT
        for token in path:
            known = tree.child(node_of, token)
            if known is None and len(tree.tokens) >= nodes:
                return tree
            node_of = tree.add(node_of, token)
    return tree
