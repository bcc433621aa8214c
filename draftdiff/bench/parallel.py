"""What one clip over several GPUs costs, on paper: bytes over links against the work that sparse attention leaves.

Per attention layer and process, with P = ulysses * ring processes. Ulysses exchanges queries, keys, values and outputs
within its group; a ring gathers the keys and values of its heads, and sums the pooled queries (a row per tile). A
process drafts the tiles of its own queries; in a ring each reads the keys and values of all to pool them.
"""

from __future__ import annotations

import json
import math
from argparse import Namespace
from dataclasses import dataclass
from itertools import product

from draftdiff.compare.table import Column, megabytes, text_table
from draftdiff.errors import UserError

# Of one H100: kept pairs and draft as measured (docs/gpu.md), links as NVIDIA states them, one way.
FLOPS, DENSE_FLOPS, DRAFT_SHARE = 433e12, 589e12, 0.047
MEMORY = 3.35e12  # bytes per second, as NVIDIA states it
NODE, INSIDE, ACROSS = 8, 450e9, 50e9  # GPUs of a node, bytes per second between two of one, and of two nodes
_TILE = 128


@dataclass(frozen=True)
class Share:
    """One layer of one process: a sequence of `tokens`, all `heads`, of which `density` of the pairs are computed.

    bytes_of: of a number in q, k and v.  Raises UserError for degrees that do not divide what they share.
    """

    tokens: int
    heads: int = 40
    head_dim: int = 128
    density: float = 0.2
    ulysses: int = 1
    ring: int = 1
    batch: int = 1
    bytes_of: int = 2

    def __post_init__(self) -> None:
        if self.heads % self.ulysses:
            raise UserError(f"{self.heads} heads cannot be shared evenly by --ulysses {self.ulysses}")

    @property
    def processes(self) -> int:
        return self.ulysses * self.ring

    @property
    def exchanged(self) -> float:
        """Bytes that a process sends in Ulysses' all-to-all: queries, keys, values, and outputs back."""
        own = self.batch * self.tokens / self.processes * self.heads * self.head_dim * self.bytes_of
        return 4 * own * (self.ulysses - 1) / self.ulysses

    @property
    def gathered(self) -> float:
        """Bytes of keys and values that a process receives in its ring."""
        all_keys = 2 * self.batch * self.tokens * self.heads / self.ulysses * self.head_dim * self.bytes_of
        return all_keys * (self.ring - 1) / self.ring

    @property
    def pooled(self) -> float:
        """Bytes of pooled queries, fp32, that a process sends to sum them over its ring; dense attention has none."""
        rows = math.ceil(self.tokens / _TILE) * self.batch * self.heads / self.ulysses
        return 2 * rows * self.head_dim * 4 * (self.ring - 1) / self.ring

    @property
    def _pairs(self) -> float:
        return 4 * self.batch * self.tokens**2 * self.heads * self.head_dim

    @property
    def dense_seconds(self) -> float:
        """Of attention, without links."""
        return self._pairs / self.processes / DENSE_FLOPS

    @property
    def sparse_seconds(self) -> float:
        """Of kept pairs, draft and probe, without links."""
        drafted = DRAFT_SHARE * self._pairs / self.processes / DENSE_FLOPS
        return self.density * self._pairs / self.processes / FLOPS + drafted + self.gathered / MEMORY

    def link_seconds(self, *, sparse: bool = True) -> float:
        """Of what goes over links, nothing hidden behind work: Ulysses inside a node, the ring across where it must."""
        ring = INSIDE if self.processes <= NODE else ACROSS
        group = INSIDE if self.ulysses <= NODE else ACROSS
        return self.exchanged / group + (self.gathered + (self.pooled if sparse else 0.0)) / ring


COLUMNS: tuple[Column, ...] = (
    ("tokens", "tokens", "{:,}".format, ""),
    ("GPUs", "processes", str, ""),
    ("ulysses x ring", "way", str, ""),
    ("over links", "bytes", megabytes, ""),
    ("dense", "dense", "{:.1f} ms".format, ""),
    ("sparse", "sparse", "{:.1f} ms".format, ""),
    ("over one GPU", "scaling", "{:.1f}x".format, ""),
    ("sparse over dense", "gain", "{:.2f}x".format, ""),
)


def table(options: Namespace) -> int:
    """Print a line for each way of sharing that the heads allow."""
    rows = []
    for tokens, processes in product(options.tokens, options.processes):
        given = (tokens, options.heads, options.head_dim, options.density)
        for ulysses in [n for n in range(1, processes + 1) if processes % n == 0 and options.heads % n == 0]:
            share = Share(*given, ulysses, processes // ulysses)
            dense = share.dense_seconds + share.link_seconds(sparse=False)
            sparse = share.sparse_seconds + share.link_seconds()
            rows.append(
                {
                    "tokens": tokens,
                    "processes": processes,
                    "way": f"{ulysses} x {processes // ulysses}",
                    "bytes": share.exchanged + share.gathered + share.pooled,
                    "dense": 1e3 * dense,
                    "sparse": 1e3 * sparse,
                    "scaling": Share(*given).sparse_seconds / sparse,
                    "gain": dense / sparse,
                }
            )
    print(json.dumps(rows) if options.json else "\n".join(text_table(rows, COLUMNS)))
    return 0
