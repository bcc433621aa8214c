"""The interval of a mean by its bootstrap."""

import numpy as np
import pytest

from draftdiff.compare.paired import mean_interval


def test_an_interval_holds_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    held = 0
    for seed in range(150):
        found = mean_interval(generator.normal(3.0, 2.0, size=40), seed)
        assert found.low <= found.mean <= found.high
        held += found.low <= 3.0 <= found.high
    assert 132 <= held <= 150  # of 142.5


def test_like_values_make_a_point_and_the_same_values_the_same_interval():
    assert vars(mean_interval([2.0] * 5)) == {"mean": 2.0, "low": 2.0, "high": 2.0}
    assert mean_interval([1.0, 5.0, 2.0]) == mean_interval([1.0, 5.0, 2.0])
    assert str(mean_interval([-1.0])) == "-1.0 (-1.0 to -1.0)"


def test_the_width_is_that_of_the_mean():
    values = np.random.default_rng(2).normal(size=400)
    found = mean_interval(values)
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
