"""Trees of fixed form for heads that rank tokens: Medusa's (arXiv 2401.10774) and Hydra's (arXiv 2402.05109).

A node is the ranks on its path: (0, 2) is the third guess after the first. Learned trees are grown as in Medusa: next
comes the node that is accepted most often.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from torch import Tensor

from draftdiff.errors import UserError
from draftdiff.llm.checks import require
from draftdiff.llm.tree import ROOT


class StaticTree:
    """Nodes sorted by depth, then by path.

    paths: ranks from below the root of each node.  parents: index of each node's parent, ROOT below the root.  levels:
    nodes of each depth, as a range.
    """

    def __init__(self, paths: Iterable[Sequence[int]]) -> None:
        """Raises ValueError for no nodes, a node twice, one without its parent, and children whose ranks have a gap."""
        given = [tuple(path) for path in paths]
        require(bool(given) and min(map(len, given)) > 0, "a tree must have at least one node, of at least one rank")
        self.paths = sorted(given, key=lambda path: (len(path), path))
        number = {path: node for node, path in enumerate(self.paths)} | {(): ROOT}
        for before, path in zip([(), *self.paths], self.paths):
            above, rank = path[:-1], path[-1]
            require(path != before, f"node {list(path)} is in the tree twice")
            require(above in number, f"node {list(path)} of the tree lacks its parent {list(above)}")
            require(
                rank == 0 or before == (*above, rank - 1),
                f"the ranks below node {list(above)} of the tree must be 0, 1, 2, ... without a gap, got {rank}",
            )
        self.parents = [number[path[:-1]] for path in self.paths]
        starts = [node for node, path in enumerate(self.paths) if node == 0 or len(path) > len(self.paths[node - 1])]
        self.levels = [range(*pair) for pair in zip(starts, [*starts[1:], len(self.paths)])]

    @property
    def depth(self) -> int:
        """Of the deepest node."""
        return len(self.levels)

    @property
    def width(self) -> int:
        """Most children of a node."""
        return max(path[-1] for path in self.paths) + 1

    @classmethod
    def from_widths(cls, widths: Sequence[int]) -> StaticTree:
        """Each node at a depth has as many children as widths says: (3, 1) is 3 nodes with one child each."""
        require(bool(widths) and min(widths) >= 1, f"widths must be positive numbers, got {tuple(widths)}")
        paths: list[tuple[int, ...]] = []
        level: list[tuple[int, ...]] = [()]
        for width in widths:
            level = [(*path, rank) for path in level for rank in range(width)]
            paths += level
        return cls(paths)

    @classmethod
    def learned(cls, acceptance: Tensor | Sequence[Sequence[float]], nodes: int) -> StaticTree:
        """The tree of so many nodes that promises most accepted tokens.

        acceptance: how often the token at each depth is the guess of each rank, [depth, ranks], as
        `rank_acceptance` measures it. Raises ValueError for more nodes than such a tree can have.
        """
        table = acceptance.tolist() if isinstance(acceptance, Tensor) else [list(row) for row in acceptance]
        require(nodes >= 1 and bool(table) and bool(table[0]), f"nodes must be at least 1, got {nodes}")
        paths: list[tuple[int, ...]] = []
        # (-share of texts in which the path is right, path); a rank comes after the one before it.
        queue: list[tuple[float, tuple[int, ...], float]] = [(-table[0][0], (0,), 1.0)]
        while len(paths) < nodes:
            if not queue:
                raise UserError(f"nodes must be at most {len(paths)} for this acceptance, got {nodes}")
            share, path, above = heapq.heappop(queue)
            paths.append(path)
            depth, rank = len(path) - 1, path[-1]
            if depth + 1 < len(table):
                heapq.heappush(queue, (share * table[depth + 1][0], (*path, 0), -share))
            if rank + 1 < len(table[depth]):
                heapq.heappush(queue, (-above * table[depth][rank + 1], (*path[:-1], rank + 1), above))
        return cls(paths)
