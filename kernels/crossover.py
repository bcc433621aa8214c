"""The density from which dense attention is the faster one: a table, so that no picture depends on a clock."""

from __future__ import annotations

import math

# Sparse time over dense time is about fixed + slope * density, so dense wins above (1 - fixed) / slope. A pair that is
# not here never loses: `cpu` beats PyTorch's dense attention at any density (0.81 to never over six readings on a CPU),
# `reference` is not there for its speed, and what is not known must not overrule the user.
_DENSE_WINS_ABOVE = {
    # Measured: 0.45 to 0.59 at head_dim 128. A little more, to err towards what was asked for.
    ("torch", "cpu"): 0.6,
    # Measured on an H100 at 75,600 tokens, everything counted, against cuDNN (docs/gpu.md): 0.08 + 1.2 * density.
    ("triton", "cuda"): 0.75,
    # Estimate: as above with copies into tile order (fixed 0.1), and half of cuDNN's rate: FlexAttention publishes nine
    # tenths of FlashAttention-2's, which is a little more than half of cuDNN's.
    ("flex", "cuda"): 0.45,
}


def dense_wins_above(backend: str, device_type: str) -> float:
    """Density from which dense attention takes less time than this backend, infinite where it never does."""
    return _DENSE_WINS_ABOVE.get((backend, device_type), math.inf)
