"""The ways to run the Triton kernel that are worth trying, by what a GPU can do and by the sizes of a call.

Those for "hopper" and tiles of 128 have been timed on an H100 (docs/gpu.md); the others were chosen for registers,
shared memory and overlap as read off compiled code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """One way to run `triton_attention.forward` or, as access "int8", `triton_int8.forward`.

    keys: keys per step.  warps, stages: as Triton's.  registers: cap per thread, 128 lets two programs of 8 warps share
    a multiprocessor.  masked_stages: stages of the loops over single tokens and the tail.
    """

    keys: int
    warps: int
    stages: int
    registers: int | None = None
    masked_stages: int | None = None


# By kind of access, padded head_dim and tile size: at most five, the one expected to be fastest first.
CONFIGS: dict[str, dict[tuple[int, int], list[Config]]] = {
    "hopper": {
        (128, 128): [
            Config(128, 8, 3, masked_stages=2),
            Config(64, 8, 4, masked_stages=3),
            Config(128, 8, 2),
        ],
        (64, 128): [
            Config(128, 8, 2, registers=128, masked_stages=2),  # the fastest, though registers spill
            Config(64, 4, 3),
            Config(64, 8, 3, registers=128, masked_stages=1),
        ],
        (128, 64): [Config(64, 4, 2), Config(64, 4, 3)],
        (64, 64): [Config(64, 4, 4), Config(64, 4, 3)],
    },
    "blackwell": {
        (128, 128): [Config(128, 8, 2), Config(64, 8, 2)],
        (64, 128): [Config(128, 8, 2), Config(64, 8, 3)],
        (128, 64): [Config(64, 8, 2)],
        (64, 64): [Config(64, 4, 2)],
    },
    "strided": {
        (128, 128): [Config(64, 8, 2), Config(32, 8, 3)],
        (64, 128): [Config(64, 8, 3), Config(64, 8, 2)],
        (128, 64): [Config(32, 4, 3), Config(64, 4, 2)],
        (64, 64): [Config(64, 4, 3), Config(64, 4, 2)],
    },
    "int8": {
        (128, 128): [Config(64, 8, 2), Config(64, 8, 3)],
        (64, 128): [Config(64, 8, 3), Config(64, 8, 2)],
        (128, 64): [Config(64, 4, 2), Config(32, 4, 3)],
        (64, 64): [Config(64, 4, 3), Config(64, 4, 2)],
    },
}
_SLOW = Config(32, 8, 1)  # fp32 and head sizes below 64: correctness only


def configs_for(access: str, dtype: torch.dtype, head_dim: int, block_size: int) -> list[Config]:
    """The configurations worth trying, at most five."""
    padded = max(16, 1 << (head_dim - 1).bit_length())
    if dtype == torch.float32 or padded < 64:
        return [_SLOW]
    return CONFIGS["strided" if access == "gather" else access][padded, block_size]
