"""Where dense attention takes over: the arithmetic on a clock that the test keeps."""

import math

import pytest
import torch

from draftdiff.kernels import crossover


@pytest.mark.parametrize(
    ("dense", "quarter", "full", "expected"),
    [
        (0.5, 0.25, 1.0, 0.5),
        (0.9, 0.25, 1.0, 0.9),
        (1.0, 0.25, 1.0, 1.0),
        (2.0, 0.25, 1.0, math.inf),
        (1.0, 1.0, 0.9, math.inf),
    ],
)
def test_it_is_where_the_line_through_two_densities_meets_dense(monkeypatch, dense, quarter, full, expected):
    clock = [0.0]
    rounds = iter(range(100))

    def spend(seconds):
        # The first round of each call is slow, as compiling and tuning make it.
        clock[0] += seconds + (10 if next(rounds) < 3 else 0)

    monkeypatch.setattr(crossover, "_now", lambda device: clock[0])
    monkeypatch.setattr(crossover.F, "scaled_dot_product_attention", lambda *x: spend(dense))
    monkeypatch.setattr(
        crossover,
        "block_sparse_attention",
        lambda q, k, v, mask, **_: spend(full if bool(mask.keep.all()) else quarter),
    )
    crossover.dense_wins_above.cache_clear()
    found = crossover.dense_wins_above("torch", torch.device("cpu"), torch.float32, 16, 64)
    crossover.dense_wins_above.cache_clear()
    assert found == pytest.approx(expected)
