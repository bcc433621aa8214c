"""Where dense attention takes over is written down, for every backend and device."""

import math

import pytest

from draftdiff.kernels.block_sparse import BACKENDS
from draftdiff.kernels.crossover import dense_wins_above


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device_type", ["cpu", "cuda", "mps", "xpu", "meta"])
def test_every_pair_has_a_density_and_those_not_measured_never_lose(backend, device_type):
    density = dense_wins_above(backend, device_type)
    known = {("torch", "cpu"): 0.6, ("triton", "cuda"): 0.75, ("flex", "cuda"): 0.45}
    assert density == known.get((backend, device_type), math.inf)
