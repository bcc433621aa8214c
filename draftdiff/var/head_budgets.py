"""A cache budget for every head and scale, from the attention that a calibration found each head to miss.

After HeatKV (arXiv 2605.14877), whose budgets are static per head and scale too; how one is shared out is ours. A key
more never gains a head as much as the one before, so giving each to the head that gains most is the best division.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from draftdiff.errors import UserError

# Of the tokens so far: the shares at which a calibration measures what is missed.
SHARES = (0.0, 1 / 64, 1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
Row: TypeAlias = "list[list[int]]"


def check_missed(missed: Tensor, layers: int, heads: int) -> Tensor:
    """What a calibration found, fp64 [layers, scales, heads, len(SHARES)]. Raises ValueError if it is of another model
    or holds what no attention can miss."""
    found = torch.as_tensor(missed, dtype=torch.float64)
    if found.ndim != 4 or (found.shape[0], *found.shape[2:]) != (layers, heads, len(SHARES)):
        wanted = f"[{layers} layers, scales, {heads} heads, {len(SHARES)} shares]"
        raise UserError(f"missed attention must be {wanted}, got {list(found.shape)}")
    if not ((found[:, 1:] >= 0) & (found[:, 1:] <= 1)).all():
        raise UserError("missed attention must be from 0 to 1 at every scale after the first")
    return found


def head_capacities(tokens: Sequence[int], mean: int, missed: Tensor, *, floor: int) -> list[Row | None]:
    """Keys that each head [layer][head] may keep after each scale but the last, None where all fit into the mean.

    tokens: of each scale.  mean: keys per head, over all heads.  missed: of the calibration, [layers, scales, heads,
    shares], with at least as many scales.  floor: least keys of a head.
    Raises ValueError for a calibration on fewer scales.
    """
    if missed.shape[1] < len(tokens):
        raise UserError(
            f"the calibration has {missed.shape[1]} scales, this picture {len(tokens)}: calibrate at its size"
        )
    layers, heads = missed.shape[0], missed.shape[2]
    held: Row = [[0] * heads for _ in range(layers)]
    rows: list[Row | None] = []
    for scale, new in enumerate(tokens[:-1]):
        held = [[n + new for n in layer] for layer in held]
        total = sum(tokens[: scale + 1])
        if total <= mean:
            rows.append(None)
            continue
        held = _divided(held, mean, [round(share * total) for share in SHARES], missed[:, scale + 1].tolist(), floor)
        rows.append(held)
    return rows


def _divided(held: Row, mean: int, counts: list[int], missed: list[list[list[float]]], floor: int) -> Row:
    """Of the keys that each head holds those that it may keep, `mean` per head over all; missed at these counts."""
    row = [[min(floor, n) for n in layer] for layer in held]
    places = [(layer, head) for layer, of_layer in enumerate(held) for head in range(len(of_layer))]
    left = mean * len(places) - sum(map(sum, row))
    steps = [(gain, layer, head, upto) for layer, head in places for gain, upto in _gains(counts, missed[layer][head])]
    # Stable: of equal gains the fewer keys first, so that a head's own steps stay in order.
    for _, layer, head, upto in sorted(steps, key=lambda step: (-step[0], step[3])):
        more = min(max(min(upto, held[layer][head]) - row[layer][head], 0), left)
        row[layer][head] += more
        left -= more
    return row


def _gains(counts: list[int], missed: list[float]) -> list[tuple[float, int]]:
    """(attention that each further key wins, up to so many keys), ever less: the convex hull of what is missed."""
    hull: list[tuple[int, float]] = []
    for count, value in zip(counts, missed):
        if hull and count == hull[-1][0]:
            continue
        while len(hull) > 1 and _slope(hull[-2], (count, value)) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append((count, value))
    return [(max(-_slope(a, b), 0.0), b[0]) for a, b in pairwise(hull)]


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
