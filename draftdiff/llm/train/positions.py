"""Far positions for short texts, so that a head that is trained on them serves long ones (LongSpec, arXiv 2502.17421).

The first tokens, to which much attention goes whatever the text, keep their positions; the others move far behind them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draftdiff.llm.checks import require
from draftdiff.llm.train.data import collate


def offset_positions(tokens: int, sinks: int, offset: int) -> Tensor:
    """Positions int64 [tokens] of a text of which all but the first `sinks` tokens move: 0, 1, offset + 2, ..."""
    positions = torch.arange(tokens)
    positions[sinks:] += offset
    return positions


def anchor_offset_positions(
    tokens: int, sinks: int = 4, max_offset: int = 30000, *, generator: torch.Generator | None = None
) -> Tensor:
    """`offset_positions` with at most so many sinks and at most this offset, both drawn evenly from 0 on.

    generator: on the CPU; None for PyTorch's global one. Raises ValueError for negative numbers.
    """
    for name, value in (("tokens", tokens), ("sinks", sinks), ("max_offset", max_offset)):
        require(isinstance(value, int) and value >= 0, f"{name} must be a whole number from 0 on, got {value!r}")
    drawn = [int(torch.randint(most + 1, (), generator=generator)) for most in (sinks, max_offset)]
    return offset_positions(tokens, *drawn)


class AnchorOffset:
    """A data_collator of any DraftTrainer: `collate`, and the batch's `position_ids` int64 [rows, tokens], drawn for
    each row anew. Target and head are then given these positions.

    reach: positions that the target has; as in the original rows of more than `longest` tokens keep theirs.  pad: token
    to pad rows with.
    """

    def __init__(self, reach: int, sinks: int = 4, longest: int = 1200, pad: int = 0) -> None:
        require(reach >= 1, f"reach must be at least 1, got {reach}")
        self.reach, self.sinks, self.longest, self.pad = reach, sinks, longest, pad

    def __call__(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = collate(rows, self.pad)
        tokens = batch["input_ids"].shape[1]
        most = max(self.reach - tokens, 0)
        found = [
            anchor_offset_positions(tokens, self.sinks, most if len(row["input_ids"]) <= self.longest else 0)
            for row in rows
        ]
        return {**batch, "position_ids": torch.stack(found)}
