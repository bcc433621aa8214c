"""Compiles the Triton kernels for a GPU that need not be there: they are launched through the code that launches them
on a GPU, on CPU tensors, with Triton told to compile and not to run.

    python -m draftdiff.kernels.ahead 90    # a compute capability; prints JSON, an entry per kernel that was compiled
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from draftdiff.core.draft import Tail
from draftdiff.core.grid import LatentGrid, tiling_for
from draftdiff.kernels import triton_backend, triton_configs, triton_draft, triton_probe
from draftdiff.kernels.autotune import DoesNotCompile
from draftdiff.kernels.problem import PRECISIONS, Problem

ACCESS = {80: "strided", 86: "strided", 89: "strided", 90: "hopper", 100: "blackwell", 120: "strided"}


class AbsentGPU(DriverBase):
    """A driver that knows what it would run on, and no more."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {}


SIZES = ((128, 128), (64, 128), (96, 128), (128, 64), (64, 64))  # head_dim and tokens per tile


def problems(every: bool, precisions: tuple[str, ...]) -> Iterator[Problem]:
    """Text on, grid ragged; every size, with and without a tail and single tokens, or two with both or neither."""
    for head_dim, block_size in SIZES:
        if head_dim != block_size and not every:
            continue
        tile = (1, 8, 16) if block_size == 128 else (2, 4, 8)
        for dtype in (torch.bfloat16, torch.float16)[: 2 if every and head_dim == 128 else 1]:
            tiling = tiling_for(LatentGrid(3, 20, 40), tile, block_size, text=77)
            q, k, v = torch.zeros(3, 1, tiling.tokens, 2, head_dim, dtype=dtype)
            means = Tail(*torch.zeros(2, 1, 2, tiling.video_tiles, head_dim))
            tokens = torch.zeros(1, 2, tiling.video_tiles, 200, dtype=torch.int32)
            keep = torch.ones(1, 2, tiling.tiles, tiling.tiles, dtype=torch.bool)
            for tail, singles in ((None, None), (means, None), (means, tokens)):
                full = Problem(q, k, v, keep, tiling, tail=tail, scale=0.1, tokens=singles)
                if every or (tail is None) == (singles is None):
                    yield full
                if "int8" in precisions and (every or (singles is not None and head_dim == 128)):
                    yield replace(full, precision="int8")


def compile_probe(every: bool) -> None:
    """Every kernel of the probe, tiles of 128, their keys sampled; in other dtypes and with all keys, too."""
    tiling = tiling_for(LatentGrid(3, 20, 40), (1, 8, 16), 128, text=77)
    shape = (1, 2, tiling.video_tiles)
    means = torch.zeros(*shape, 128)
    asked = ((torch.bfloat16, 256), (torch.float32, 256), (torch.float16, triton_probe.MOST))
    for dtype, most in asked if every else asked[:1]:
        k, v = torch.zeros(2, 1, tiling.tokens, 2, 128, dtype=dtype)
        with mock.patch.object(triton_probe, "MOST", most):
            given = (means, k, v, Tail(means, means), tiling)
            error = triton_probe.errors(*given, scale=0.1)
            keep = triton_probe.worst(error, torch.full((2,), 0.2, dtype=torch.float64))
            triton_probe.singles(*given, keep, scale=0.1, tokens=40)
    triton_probe.singles(*given, keep, scale=0.1, tokens=40)
    triton_probe.worst(torch.zeros(1, 1, 1, triton_probe.MOST), torch.ones(1, dtype=torch.float64))


def compiled_for(capability: int, every: bool) -> Iterator[tuple[dict[str, Any], Any]]:
    """What was asked for, empty for the draft and the lists, and the kernel, or why it does not compile.

    Every configuration of this capability's access, or the first, for each of `problems`. A process compiles for one
    capability: Triton keeps what it has compiled.
    """
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    triton.runtime.driver.set_active(AbsentGPU(capability))
    access = ACCESS[capability]
    precisions = PRECISIONS if access == "strided" else ("full",)
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(triton_backend, "_architecture", return_value=access),
    ):
        for problem in problems(every, precisions):
            head_dim, block_size = problem.q.shape[-1], problem.tiling.block_size
            compiled.clear()
            call = triton_backend.Call.prepare(problem, want_lse=True)
            assert call.access == (access if problem.precision == "full" else "int8")
            yield from (({}, kernel) for kernel in compiled if kernel.metadata.name == "quantise")
            configs = triton_configs.configs_for(call.access, problem.q.dtype, head_dim, block_size)
            for config in configs if every else configs[:1]:
                compiled.clear()
                about = {"head_dim": head_dim, "block": block_size, "dtype": str(problem.q.dtype)}
                about |= {
                    "precision": problem.precision,
                    "tail": problem.tail is not None,
                    "singles": call.singles,
                    "config": str(config),
                }
                try:
                    call.launch(config)
                except DoesNotCompile as error:
                    yield about, error
                yield from ((about, kernel) for kernel in compiled)
        compiled.clear()
        tiling = problem.tiling
        triton_draft.pool(problem.q, tiling)
        triton_draft.select_draft(torch.zeros(1, 2, 600, 600), torch.full((2,), 0.2, dtype=torch.float64))
        for tokens in (None, problem.tokens):
            triton_backend.list_tiles(problem.keep, tiling, entries=call.tables.kinds, tail=True, tokens=tokens)
        compile_probe(every)
        yield from (({}, kernel) for kernel in compiled)


def main(capability: int) -> list[dict[str, Any]]:
    return [
        {**about, "kernel": "forward", "error": str(kernel)}
        if isinstance(kernel, DoesNotCompile)
        else {**about, "kernel": kernel.metadata.name, "shared": kernel.metadata.shared}
        for about, kernel in compiled_for(capability, every=False)
    ]


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
