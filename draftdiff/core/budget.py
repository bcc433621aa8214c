"""How many key tiles may be read or keys kept: a mean share, spread over steps, layers, heads and scales."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def check_sparsity(sparsity: float) -> float:
    """Return sparsity if it is a share in [0, 1), else raise ValueError naming it."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1, got {sparsity}")
    return float(sparsity)


@dataclass(frozen=True)
class Budget:
    """Sparsity with weights on the kept share (density = 1 - sparsity), each 1 where nothing is given.

    sparsity: share of video key tiles that a head skips, in [0, 1).
    steps: weights over equal stretches of the sparse steps, first to last: (1.5, 1, 0.5) starts careful.
    layers: one weight per attention layer.
    heads: one weight per head, or one row of them per layer.
    """

    sparsity: float = 0.75
    steps: tuple[float, ...] = ()
    layers: tuple[float, ...] = ()
    heads: tuple[float, ...] | tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        for name in ("steps", "layers", "heads"):
            weights = torch.tensor(getattr(self, name) or (1.0,), dtype=torch.float64)
            if not bool((weights > 0).all()) or not bool(weights.isfinite().all()):
                raise ValueError(f"budget weights must be positive, got {name}={getattr(self, name)}")

    def density(self, layers: int, heads: int, progress: float = 0.0) -> Tensor:
        """Kept share per layer and head, float64 [layers, heads], at `progress` in [0, 1) through the sparse steps.

        Raises ValueError if the weights were given for another number of layers or heads.
        """
        kept = torch.full((layers, heads), 1 - self.sparsity, dtype=torch.float64)
        if self.steps:
            kept *= self.steps[min(int(progress * len(self.steps)), len(self.steps) - 1)]
        if self.layers:
            kept *= self._weights("layers", self.layers, (layers,))[:, None]
        if self.heads:
            shape = (layers, heads) if isinstance(self.heads[0], Sequence) else (heads,)
            kept *= self._weights("heads", self.heads, shape)
        return kept.clamp(max=1.0)

    @staticmethod
    def _weights(name: str, weights: Sequence, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.tensor(weights, dtype=torch.float64)
        if tensor.shape != shape:
            raise ValueError(f"budget weights {name} must have shape {shape} for this model, got {tuple(tensor.shape)}")
        return tensor


def check_cache_budget(budget: float) -> float:
    """Return a budget if it is a share in (0, 1], else raise ValueError naming it."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise ValueError(f"budget must be above 0 and at most 1, got {budget!r}")
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
