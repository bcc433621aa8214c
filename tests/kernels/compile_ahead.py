"""Compiles the Triton kernels for a GPU that need not be there, and reads what the machine code says.

    python -m tests.kernels.compile_ahead 90          # compute capability; prints a JSON list, an entry per kernel
    python -m tests.kernels.compile_ahead 90 every    # not the first configuration alone

The kernels are launched through the code that launches them on a GPU, on CPU tensors, with Triton told to compile and
not to run. Registers, spills and instructions come from the tools inside the triton wheel.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import numpy as np
import torch
import triton
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from draftdiff.core.draft import Tail
from draftdiff.core.grid import LatentGrid, tiling_for
from draftdiff.kernels import triton_backend, triton_configs, triton_draft, triton_probe
from draftdiff.kernels.autotune import DoesNotCompile
from draftdiff.kernels.problem import PRECISIONS, Problem

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ACCESS = {80: "strided", 86: "strided", 89: "strided", 90: "hopper", 100: "blackwell", 120: "strided"}
PRODUCTS = {90: "HGMMA", 100: "UTC.?MMA"}  # others: HMMA, in 8 bits IMMA
COUNTED = {
    "spills": r"\b(STL|LDL)\b",
    "bulk_tensor_loads": "UTMALDG",
    "arrivals": r"WARPGROUP\.ARRIVE",
    "drains": r"WARPGROUP\.DEPBAR",
    "register_handovers": "USETMAXREG",
}


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


def machine_code(kernel: Any, capability: int) -> dict[str, Any]:
    """Registers, shared memory in bytes and the instructions that matter, in all and in each loop over keys."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def tool(name: str, *flags: str) -> str:
            command = [TOOLS / name, *flags, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = tool("cuobjdump", "-res-usage"), tool("nvdisasm", "-c")
    patterns = {"products": PRODUCTS.get(capability, r"\b[HI]MMA"), **COUNTED}

    def counted(lines: list[str]) -> dict[str, int]:
        found = {name: sum(bool(re.search(pattern, line)) for line in lines) for name, pattern in patterns.items()}
        return {"instructions": len(lines), **found}

    instructions, loops = parsed(code)
    return {
        "kernel": kernel.metadata.name,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "shared": kernel.metadata.shared,
        **counted(instructions),
        "loops": [loop for loop in map(counted, loops) if loop["products"]],
    }


def parsed(code: str) -> tuple[list[str], list[list[str]]]:
    """The instructions of a disassembly, and those of each loop: of a set that all lead to one another."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    edges = []
    for at, instruction in enumerate(instructions):
        if target := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction):
            edges.append((at, labels[target[1]]))
        if not re.match(r"(EXIT|RET\b|BRA(\.U)? `)", instruction) and at + 1 < len(instructions):
            edges.append((at, at + 1))
    graph = coo_array((np.ones(len(edges)), np.array(edges).T), shape=(len(instructions),) * 2)
    _, member = connected_components(graph, connection="strong")
    loops: dict[int, list[str]] = {}
    for instruction, loop in zip(instructions, member.tolist()):
        loops.setdefault(loop, []).append(instruction)
    return instructions, [loop for loop in loops.values() if len(loop) > 1]


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


def compile_all(capability: int, every: bool) -> list[dict[str, Any]]:
    """Every configuration of this capability's access, or the first, for each of `problems`."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    found = []
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
            found += [machine_code(kernel, capability) for kernel in compiled if kernel.metadata.name == "quantise"]
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
                    found.append({**about, "kernel": "forward", "error": str(error)})
                found += [{**about, **machine_code(kernel, capability)} for kernel in compiled]
        compiled.clear()
        tiling = problem.tiling
        triton_draft.pool(problem.q, tiling)
        triton_draft.select_draft(torch.zeros(1, 2, 600, 600), torch.full((2,), 0.2, dtype=torch.float64))
        for tokens in (None, problem.tokens):
            triton_backend.list_tiles(problem.keep, tiling, entries=call.tables.kinds, tail=True, tokens=tokens)
        compile_probe(every)
        found += [machine_code(kernel, capability) for kernel in compiled]
    return found


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]), sys.argv[2:] == ["every"])))
