"""How a tree of drafts grows: a chain, the likeliest paths, or a sampled tree.

Chains are speculative decoding (arXiv 2211.17192); trees of the likeliest continuations grow where the draft itself is
confident, as in EAGLE-2 (arXiv 2406.16858); sampled trees are SpecInfer's (arXiv 2305.09781) with the samplers of arXiv
2502.18779. A branch ends early where the draft's probability of its whole path falls below `confidence`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from draftdiff.llm.checks import require
from draftdiff.llm.tree import ROOT, Draws, Tree
from draftdiff.llm.verify import check_verifier, sample

# The draft's distributions after nodes of each row's tree, [nodes, vocabulary] for each row.
Expand = Callable[[list[list[int]]], list[Tensor]]


class Shape(Protocol):
    """How a tree grows from the draft's distributions."""

    def grow(self, trees: list[Tree], roots: list[Tensor], room: list[int], sampling: bool, expand: Expand) -> None:
        """Add nodes to the trees. roots: distributions [1, vocabulary] after the last accepted tokens."""


@dataclass(frozen=True)
class Sampled:
    """A tree whose nodes have `branching[depth]` children each, sampled when the target samples, else the likeliest.

    sampler, verifier: keys of `verify.VERIFIERS`.  confidence: least probability of a path that is drafted further.
    """

    branching: tuple[int, ...] = (4, 2, 1, 1)
    sampler: str = "without_replacement"
    verifier: str = "rrs"
    confidence: float = 0.0

    def __post_init__(self) -> None:
        check_verifier(self.sampler, self.verifier)
        require(min(self.branching, default=0) >= 1, f"branching must be positive numbers, got {self.branching}")
        require(0 <= self.confidence < 1, f"confidence must be in [0, 1), got {self.confidence}")

    @classmethod
    def chain(cls, length: int = 5, confidence: float = 0.0) -> Sampled:
        """A chain of up to `length` tokens."""
        require(length >= 1, f"length must be at least 1, got {length}")
        return cls((1,) * length, "with_replacement", "rrs", confidence)

    def grow(self, trees: list[Tree], roots: list[Tensor], room: list[int], sampling: bool, expand: Expand) -> None:
        """Level by level."""
        frontier = [[(ROOT, 1.0)] if left > 0 else [] for left in room]
        found = roots
        for depth, count in enumerate(self.branching):
            if depth:
                if not any(frontier):
                    break
                found = expand([[node for node, _ in nodes] for nodes in frontier])
            for row, tree in enumerate(trees):
                grown: list[tuple[int, float]] = []
                for (node, chance), q in zip(frontier[row], found[row]):
                    tokens = sample(q, count, self.sampler) if sampling else _likeliest(q, count)
                    if sampling:
                        tree.draws[node] = Draws(q, tokens, self.sampler, self.verifier)
                    grown += [(tree.add(node, token), chance * float(q[token])) for token in dict.fromkeys(tokens)]
                more = depth + 1 < room[row]
                frontier[row] = [(node, chance) for node, chance in grown if more and chance >= self.confidence]


def _likeliest(q: Tensor, count: int) -> list[int]:
    """Fewer where q has fewer tokens of positive chance."""
    best = q.topk(min(count, len(q)))
    return [token for token, chance in zip(best.indices.tolist(), best.values.tolist()) if chance > 0]


Chain = Sampled.chain


@dataclass(frozen=True)
class KBest:
    """A tree of the draft's likeliest paths: each level expands the best `width` nodes, `nodes` are proposed in all."""

    depth: int = 5
    width: int = 6
    nodes: int = 48
    confidence: float = 0.0

    def __post_init__(self) -> None:
        require(self.depth >= 1, f"depth must be at least 1, got {self.depth}")
        require(self.width >= 1, f"width must be at least 1, got {self.width}")
        least = self.width * max(self.depth - 1, 1)
        require(self.nodes >= least, f"nodes must be at least width * (depth - 1) = {least}, got {self.nodes}")
        require(0 <= self.confidence < 1, f"confidence must be in [0, 1), got {self.confidence}")

    def grow(self, trees: list[Tree], roots: list[Tensor], room: list[int], sampling: bool, expand: Expand) -> None:
        """Level by level, then the best of what was seen but not expanded."""
        frontier = [[(ROOT, 1.0)] if left > 0 else [] for left in room]
        spare: list[list[tuple[float, int, int]]] = [[] for _ in trees]  # (chance of the path, parent, token)
        found = roots
        for depth in range(self.depth):
            if depth:
                if not any(frontier):
                    break
                found = expand([[node for node, _ in nodes] for nodes in frontier])
            for row, tree in enumerate(trees):
                if not frontier[row]:
                    continue
                best = found[row].topk(min(self.width, found[row].shape[1]))
                seen = [
                    (chance * q, node, token)
                    for (node, chance), some, tokens in zip(frontier[row], best.values.tolist(), best.indices.tolist())
                    for q, token in zip(some, tokens)
                    if q > 0
                ]
                seen.sort(reverse=True)
                last = depth + 1 == min(self.depth, room[row])
                chosen = [] if last else [one for one in seen[: self.width] if one[0] >= self.confidence]
                spare[row] += seen[len(chosen) :]
                frontier[row] = [(tree.add(node, token), chance) for chance, node, token in chosen]
        for row, tree in enumerate(trees):
            spare[row].sort(reverse=True)
            for _, node, token in spare[row][: self.nodes - len(tree.tokens)]:
                tree.add(node, token)


@dataclass(frozen=True)
class Beams:
    """A tree of beams: at each depth the `widths[depth]` likeliest paths, all of which are proposed (LongSpec, arXiv
    2502.17421). (1, 1, 1) is a chain of likeliest tokens, drawn from nothing and so verified by `match`."""

    widths: tuple[int, ...] = (4, 16, 16, 16, 16)

    def __post_init__(self) -> None:
        require(min(self.widths, default=0) >= 1, f"widths must be positive numbers, got {self.widths}")

    def grow(self, trees: list[Tree], roots: list[Tensor], room: list[int], sampling: bool, expand: Expand) -> None:
        """Level by level."""
        frontier = [[(ROOT, 1.0)] if left > 0 else [] for left in room]
        found = roots
        for depth, width in enumerate(self.widths):
            if depth:
                if not any(frontier):
                    break
                found = expand([[node for node, _ in nodes] for nodes in frontier])
            for row, tree in enumerate(trees):
                if not frontier[row]:
                    continue
                best = found[row].topk(min(width, found[row].shape[1]))
                seen = [
                    (chance * q, node, token)
                    for (node, chance), some, tokens in zip(frontier[row], best.values.tolist(), best.indices.tolist())
                    for q, token in zip(some, tokens)
                    if q > 0
                ]
                chosen = [seen[i] for i in _best(seen, 0, width)]
                grown = [(tree.add(node, token), chance) for chance, node, token in chosen]
                frontier[row] = grown if depth + 1 < room[row] else []


@dataclass(frozen=True)
class Reranked:
    """A tree of the best of all that the draft has seen: each level expands the best `width` nodes, then the best
    `nodes` are proposed, which may leave out some that were expanded (EAGLE-2 and EAGLE-3; their depth is one less).
    """

    depth: int = 8
    width: int = 10
    nodes: int = 59

    def __post_init__(self) -> None:
        for name in ("depth", "width", "nodes"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")

    def grow(self, trees: list[Tree], roots: list[Tensor], room: list[int], sampling: bool, expand: Expand) -> None:
        """Level by level; the trees in the list are replaced by those that are left."""
        # Of each row all that was seen, (chance of its path, what it stands below, token), and what of it was expanded.
        seen: list[list[tuple[float, int, int]]] = [[] for _ in trees]
        grown = [{ROOT: ROOT} for _ in trees]
        frontier = [[ROOT] if left > 0 else [] for left in room]
        found = roots
        for depth in range(self.depth):
            if depth:
                if not any(frontier):
                    break
                found = expand([[nodes[i] for i in some] for nodes, some in zip(grown, frontier)])
            for row, tree in enumerate(trees):
                if not frontier[row]:
                    continue
                known, start = seen[row], len(seen[row])
                best = found[row].topk(min(self.width, found[row].shape[1]))
                for above, some, tokens in zip(frontier[row], best.values.tolist(), best.indices.tolist()):
                    chance = 1.0 if above == ROOT else known[above][0]
                    known += [(chance * q, above, token) for q, token in zip(some, tokens) if q > 0]
                last = depth + 1 == min(self.depth, room[row])
                frontier[row] = [] if last else _best(known, start, self.width)
                for i in frontier[row]:
                    _, above, token = known[i]
                    grown[row][i] = tree.add(grown[row][above], token)
        for row, known in enumerate(seen):
            trees[row], nodes = Tree(), {ROOT: ROOT}
            # None is better than what it stands below, which was seen before it.
            for i in sorted(_best(known, 0, self.nodes)):
                _, above, token = known[i]
                nodes[i] = trees[row].add(nodes[above], token)


def _best(seen: list[tuple[float, int, int]], start: int, count: int) -> list[int]:
    """The places from `start` on of the `count` likeliest, in that order, the first seen first among equals."""
    return sorted(range(start, len(seen)), key=lambda i: -seen[i][0])[:count]
