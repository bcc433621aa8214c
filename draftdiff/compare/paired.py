"""Paired differences with their interval: two ways of answering the same cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES, LEVEL = 10_000, 0.95


@dataclass(frozen=True)
class Interval:
    """A mean, and where it lies by the percentiles of its bootstrap."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean of one or more values and its 95 % interval, by drawing them anew 10,000 times.

    For paired differences the values are those of the cases: what makes a case hard is in both of its sides. Where all
    values are alike the interval is a point, which says no more than that nothing differed in these.
    """
    drawn = np.asarray(values, float)
    generator = np.random.default_rng(seed)
    means = drawn[generator.integers(len(drawn), size=(RESAMPLES, len(drawn)))].mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(drawn.mean()), float(low), float(high))
