"""Where dense attention is the faster one."""

import math


def dense_wins_above(backend: str, kind: str) -> float:
    return {("torch", "cpu"): 0.6}.get((backend, kind), math.inf)
