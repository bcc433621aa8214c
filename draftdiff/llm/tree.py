"""Drafted tokens as a tree below the last accepted token. A chain is a tree with one child per node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from draftdiff.errors import UserError

ROOT = -1


@dataclass
class Draws:
    """How a node's children were sampled, for verification by rejection.

    q: [vocabulary], the distribution the first draw came from.  tokens: the draws in order, repeats included.
    sampler, verifier: keys of `verify.VERIFIERS`.
    """

    q: Tensor
    tokens: list[int]
    sampler: str
    verifier: str


@dataclass
class Tree:
    """A proposal for one row of the batch: nodes 0, 1, ... with a parent each, which comes before its children.

    tokens: of the nodes.  parents: their parents' index, ROOT below the last accepted token.  draws: for nodes whose
    children were sampled, ROOT among them; children of the others may have been chosen in any way at all.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    draws: dict[int, Draws] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._child = {(parent, token): node for node, (parent, token) in enumerate(zip(self.parents, self.tokens))}
        if len(self._child) != len(self.tokens):
            raise UserError("a tree has two children of one node with the same token")

    def add(self, parent: int, token: int) -> int:
        """The child of `parent` with this token, made if it is new."""
        node = self._child.setdefault((parent, token), len(self.tokens))
        if node == len(self.tokens):
            self.tokens.append(token)
            self.parents.append(parent)
        return node

    def child(self, parent: int, token: int) -> int | None:
        """The child of `parent` with this token."""
        return self._child.get((parent, token))

    def path(self, node: int) -> list[int]:
        """The nodes from below the root to `node`."""
        nodes: list[int] = []
        while node != ROOT:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def depths(self) -> list[int]:
        """Depth of each node, 1 for the children of the root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths


def ancestors(parents: Sequence[int], before: Sequence[int] = ()) -> list[int]:
    """Which nodes each node sees, itself and its ancestors, as the bits of an integer.

    parents: of all nodes, ROOT or an index.  before: the same for the first nodes.
    """
    seen = list(before)
    for node in range(len(seen), len(parents)):
        parent = parents[node]
        seen.append(1 << node | (0 if parent == ROOT else seen[parent]))
    return seen


def as_mask(seen: Sequence[int], width: int) -> np.ndarray:
    """The lowest bits of each integer, bool [integers, width]."""
    size = (width + 7) // 8
    packed = np.frombuffer(b"".join(bits.to_bytes(size, "little") for bits in seen), np.uint8).reshape(len(seen), size)
    return np.unpackbits(packed, axis=1, count=width, bitorder="little").view(bool)
