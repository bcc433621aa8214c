"""How many keys every layer, or every head, keeps of the scales so far (ScaleKV, arXiv 2505.19602).

Wide layers, which look at everything, keep nearly everything; local layers, which look at the current scale, share what
is left. (The paper's words are drafters and refiners, which here are CoDe's.)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draftdiff.core.importance import POOLINGS
from draftdiff.errors import UserError
from draftdiff.var.head_budgets import check_missed, head_capacities

SCORINGS = {"paper": "average", "upstream": "max"}  # and the pooling that goes with it
ALLOCATIONS = ("full", "linear")
PER = ("layer", "head")

# Of the authors, in tokens at a mean of 650 per layer: least of a local layer, first of the linear decay, its step.
_MEAN, _FLOOR, _START, _STEP = 650, 200, 600, 70
WINDOW_SIDE = 4

# What the authors' calibration found for the 32 layers of Infinity 2B and the 40 of 8B, by scale.
RELEASED_WIDE_LAYERS: Mapping[int, Mapping[int, Collection[int]]] = {
    32: {scale: (0, 23) if scale < 12 else (0,) for scale in range(13)},
    40: dict.fromkeys(range(13), (0, 1, 2)),
}

WideLayers = Sequence[int] | Mapping[int, Collection[int]] | None
Capacities = Sequence[int] | Sequence[Sequence[int]]  # by layer, or by layer and head


def check_cache_budget(budget: float) -> float:
    """Return a budget if it is a share in (0, 1], else raise ValueError naming it."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise UserError(f"budget must be above 0 and at most 1, got {budget!r}")
    return float(budget)


def full_split(limit: int, mean: int, layers: int, drafters: int, floor: int) -> tuple[int, int]:
    """Keys of a drafter and of a refiner layer: drafters keep nearly all they have, refiners share the rest.

    The rule that gives both published tables of ScaleKV: the largest drafter capacity, at most `limit`, that leaves the
    refiners the same whole number each, at least `floor`, with `mean` keys per layer over all of them.
    """
    refiners = layers - drafters
    if not drafters or not refiners:
        return mean, mean
    for capacity in range(limit, mean, -1):
        refiner, rest = divmod(mean * layers - drafters * capacity, refiners)
        if rest == 0 and refiner >= floor:
            return capacity, refiner
    return mean, mean


def scale_capacities(
    tokens: Sequence[int],
    mean: int,
    layers: int,
    drafters: Sequence[Collection[int]],
    *,
    floor: int,
    decay: tuple[int, float] | None = None,
) -> list[list[int] | None]:
    """Keys that each layer may keep after each scale but the last, None where all fit into the mean.

    tokens: of each scale.  mean: keys per layer, over all layers.  drafters: for each scale the layers that look widely
    while it is generated; what they may keep is decided after the scale before.  floor: least keys of a refiner.
    decay: (start, step) to shrink refiners linearly instead of by `full_split`, to start - step * k at the k-th cut
    (ScaleKV, arXiv 2505.19602, section 3.3); drafters share what that leaves.
    """
    rows: list[list[int] | None] = []
    held, cuts = 0, 0
    for scale, new in enumerate(tokens[:-1]):
        held += new
        if sum(tokens[: scale + 1]) <= mean:
            rows.append(None)
            continue
        drafting = set(drafters[scale + 1])
        refiners = layers - len(drafting)
        if decay is None or not drafting:
            drafter, refiner = full_split(held, mean, layers, len(drafting), floor)
        else:
            start, step = decay
            refiner = min(max(round(start - step * cuts), floor), mean)
            drafter = min((mean * layers - refiners * refiner) // len(drafting), held)
        rows.append([drafter if layer in drafting else refiner for layer in range(layers)])
        held, cuts = drafter, cuts + 1
    return rows


@dataclass(frozen=True)
class ScaleKVConfig:
    """How much of the cache to keep, and by what rule.

    budget: mean share of the tokens of all scales but the last, in (0, 1], over layers; 1 keeps everything.
    wide_layers: layers that look widely, the same at every scale or for each scale number; None takes the authors' for
    Infinity's depths and the first twelfth of the layers elsewhere. `calibrate_scale_kv` on a pipeline measures them.
    allocation: "full" (wide layers keep nearly all they have, as in the published tables) or "linear" (local ones
    shrink from scale to scale, as in the paper).
    scoring: "paper" (softmax attention, averaged over neighbours) or "upstream" (the authors' code: raw queries
    without bias, normalisation and rotation, no softmax, maximum over neighbours). At a budget of a tenth, "paper"
    changed fewer bits of the golden data's toy Infinity, 1.7 against 1.9 %.  pooling: "average" or "max" instead.
    kernel: neighbours that are pooled.
    per: "layer", or "head": a budget for every head and scale instead of wide and local layers, from `missed`, which a
    calibration on the same model finds: fp64 [layers, scales, heads, shares], see Selectivity.
    """

    budget: float = 0.1
    wide_layers: WideLayers = None
    allocation: str = "full"
    scoring: str = "paper"
    pooling: str | None = None
    kernel: int = 5
    per: str = "layer"
    missed: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_cache_budget(self.budget)
        for name, value, allowed in (
            ("allocation", self.allocation, ALLOCATIONS),
            ("scoring", self.scoring, tuple(SCORINGS)),
            ("pooling", self.pooling, (None, *POOLINGS)),
            ("per", self.per, PER),
        ):
            if value not in allowed:
                raise UserError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"kernel must be odd and positive, got {self.kernel}")
        if (self.per == "head") != (self.missed is not None):
            raise UserError("per='head' and missed=, what calibrate_scale_kv found for this model, need each other")
        if self.per == "head" and (self.wide_layers is not None or self.allocation != "full"):
            raise UserError("wide_layers and allocation are for per='layer'")

    def check_model(self, layers: int, heads: int) -> None:
        """Raise ValueError for wide layers or a calibration that are not of such a model."""
        self.check_wide_layers(layers)
        if self.missed is not None:
            check_missed(self.missed, layers, heads)

    def check_wide_layers(self, layers: int) -> None:
        """Raise ValueError for a wide layer that is no layer of such a model."""
        rows = self.wide_layers.values() if isinstance(self.wide_layers, Mapping) else [self.wide_layers or ()]
        for layer in (layer for row in rows for layer in row):
            if not 0 <= layer < layers:
                raise UserError(f"wide layers must be from 0 to {layers - 1}, got {layer}")

    def wide_by_scale(self, scales: int, layers: int) -> list[set[int]]:
        """The wide layers of each scale. Raises ValueError for a layer that is not there."""
        self.check_wide_layers(layers)
        chosen: Any = self.wide_layers
        if chosen is None:
            chosen = RELEASED_WIDE_LAYERS.get(layers, range(max(round(layers / 12), 1)))
        if not isinstance(chosen, Mapping):
            chosen = dict.fromkeys(range(scales), chosen)
        chosen = {int(scale): row for scale, row in chosen.items()}  # numbers are texts after a detour through JSON
        return [set(chosen.get(scale, ())) for scale in range(scales)]

    def capacities(self, tokens: Sequence[int], layers: int) -> Sequence[Capacities | None]:
        """Keys each layer or head may keep after each scale but the last, None for all; `tokens` of each scale."""
        mean = max(int(self.budget * sum(tokens[:-1])), 1)
        floor = max(mean * _FLOOR // _MEAN, 1)
        if self.missed is not None:
            return head_capacities(tokens, mean, torch.as_tensor(self.missed), floor=floor)
        decay = (_START * mean // _MEAN, _STEP * mean / _MEAN) if self.allocation == "linear" else None
        return scale_capacities(tokens, mean, layers, self.wide_by_scale(len(tokens), layers), floor=floor, decay=decay)


def window(scale: tuple[int, int], side: int = WINDOW_SIDE) -> Tensor:
    """Raster positions, int64 [side^2], of the middles of side x side patches of a scale (height, width)."""
    rows, columns = (torch.arange(side) * (n // side) + (n // side - 1) // 2 for n in scale)
    return (rows[:, None] * scale[1] + columns).flatten()
