"""How many key tiles may be read: a mean share, spread over steps, layers and heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from draftdiff.core.values import is_number, plain, shown
from draftdiff.errors import UserError


def check_sparsity(sparsity: float) -> float:
    """Return sparsity if it is a share in [0, 1), else raise ValueError naming it."""
    if not is_number(sparsity) or not 0 <= sparsity < 1:
        raise UserError(f"sparsity must be at least 0 and below 1, got {shown(sparsity)}")
    return float(sparsity)


def stretch_at(progress: float, stretches: int) -> int:
    """Which of so many equal stretches a progress in [0, 1] is in."""
    return min(int(progress * stretches + 1e-9), stretches - 1)  # 0.58 * 50 is a little less than 29


def _shape(weights: Any) -> tuple[int, ...] | None:
    """Lengths of a tuple, of those in it, and so on; () of anything else, None where they are uneven."""
    if not isinstance(weights, tuple):
        return ()
    inner = {_shape(row) for row in weights} or {()}
    one = inner.pop()
    return None if inner or one is None else (len(weights), *one)


def _values(weights: Any) -> Iterator[Any]:
    if not isinstance(weights, tuple):
        yield weights
        return
    for row in weights:
        yield from _values(row)


@dataclass(frozen=True)
class Budget:
    """Sparsity with weights on the kept share (density = 1 - sparsity), each 1 where nothing is given.

    sparsity: share of video key tiles that a head skips, in [0, 1).
    steps: weights over equal stretches of the sparse steps, first to last: (1.5, 1, 0.5) starts careful.
    layers: one weight per attention layer.
    heads: one weight per head, a row of them per layer, or such rows for each of equal stretches of the sparse steps.
        With a sparsity of 0 the weights of a whole table are the kept shares themselves.
    Lists and arrays are taken for tuples. Raises ValueError that names the value for anything else.
    """

    sparsity: float = 0.75
    steps: tuple[float, ...] = ()
    layers: tuple[float, ...] = ()
    heads: tuple[float, ...] | tuple[tuple[float, ...], ...] | tuple[tuple[tuple[float, ...], ...], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", check_sparsity(plain(self.sparsity)))
        for name in ("steps", "layers", "heads"):
            weights = plain(getattr(self, name))
            shape = _shape(weights)
            if not shape or len(shape) > (3 if name == "heads" else 1):
                raise UserError(f"budget weights must be a tuple of numbers, got {name}={shown(getattr(self, name))}")
            if not all(is_number(weight) and weight > 0 for weight in _values(weights)):
                raise UserError(f"budget weights must be positive, got {name}={shown(getattr(self, name))}")
            object.__setattr__(self, name, weights)

    @classmethod
    def over_steps(cls, sparsities: tuple[float, ...]) -> Budget:
        """A sparsity for each of equal stretches of the sparse steps, first to last. Raises ValueError as `Budget`."""
        if not sparsities:
            raise UserError("sparsity must be one number or several, got ()")
        kept = [1 - check_sparsity(sparsity) for sparsity in sparsities]
        mean = fmean(kept)
        return cls(1 - mean, steps=tuple(share / mean for share in kept))

    def density(self, layers: int, heads: int, progress: float = 0.0) -> Tensor:
        """Kept share per layer and head, float64 [layers, heads], at `progress` in [0, 1) through the sparse steps.

        Raises ValueError if the weights were given for another number of layers or heads.
        """
        kept = torch.full((layers, heads), 1 - self.sparsity, dtype=torch.float64)
        if self.steps:
            kept *= self.steps[stretch_at(progress, len(self.steps))]
        if self.layers:
            kept *= self._weights("layers", self.layers, (layers,))[:, None]
        if self.heads:
            table: Sequence = self.heads
            depth = len(_shape(table) or ())
            if depth == 3:
                table = table[stretch_at(progress, len(table))]
            kept *= self._weights("heads", table, (heads,) if depth == 1 else (layers, heads))
        return kept.clamp(max=1.0)

    @staticmethod
    def _weights(name: str, weights: Sequence, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.tensor(weights, dtype=torch.float64)
        if tensor.shape != shape:
            raise UserError(f"budget weights {name} must have shape {shape} for this model, got {tuple(tensor.shape)}")
        return tensor
