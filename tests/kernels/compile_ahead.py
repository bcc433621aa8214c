"""Compiles the Triton kernels for a GPU that need not be there, and reads what the machine code says.

    python -m tests.kernels.compile_ahead 90     # compute capability; prints a JSON list, an entry per kernel

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
from pathlib import Path
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
from draftdiff.kernels.problem import Problem

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ACCESS = {80: "strided", 90: "hopper", 100: "blackwell"}


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


def machine_code(kernel: Any) -> dict[str, Any]:
    """Registers, spills and the instructions that matter."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def tool(name: str, *flags: str) -> str:
            command = [TOOLS / name, *flags, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = tool("cuobjdump", "-res-usage"), tool("nvdisasm", "-c")
    count = {
        "spill_stores": r"\bSTL",
        "bulk_tensor_loads": "UTMALDG",
        "hopper_products": "HGMMA",
        "blackwell_products": "UTC.?MMA",
        "ampere_products": r"\bHMMA",
        "register_handovers": "USETMAXREG",
    }
    return {
        "kernel": kernel.metadata.name,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        "shared_kib": kernel.metadata.shared // 1024,
        **{name: len(re.findall(pattern, code)) for name, pattern in count.items()},
    }


def compile_probe() -> None:
    """Every kernel of the probe, tiles of 128, their keys sampled and all of them."""
    tiling = tiling_for(LatentGrid(3, 20, 40), (1, 8, 16), 128, text=77)
    shape = (1, 2, tiling.video_tiles)
    means = torch.zeros(*shape, 128)
    for dtype, most in ((torch.bfloat16, 256), (torch.float32, 256), (torch.float16, triton_probe.MOST)):
        k, v = torch.zeros(2, 1, tiling.tokens, 2, 128, dtype=dtype)
        with mock.patch.object(triton_probe, "MOST", most):
            given = (means, k, v, Tail(means, means), tiling)
            error = triton_probe.errors(*given, scale=0.1)
            keep = triton_probe.worst(error, torch.full((2,), 0.2, dtype=torch.float64))
            triton_probe.singles(*given, keep, scale=0.1, tokens=40)
    triton_probe.worst(torch.zeros(1, 1, 1, triton_probe.MOST), torch.ones(1, dtype=torch.float64))


def compile_all(capability: int) -> list[dict[str, Any]]:
    """Every configuration of this capability's access, head sizes and tile sizes, tail and text on, grid ragged."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    found = []
    triton.runtime.driver.set_active(AbsentGPU(capability))
    access = ACCESS[capability]
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(triton_backend, "_architecture", return_value=access),
    ):
        for head_dim, block_size in ((128, 128), (64, 128), (96, 128), (128, 64), (64, 64)):
            tile = (1, 8, 16) if block_size == 128 else (2, 4, 8)
            for dtype in (torch.bfloat16, torch.float16)[: 2 if head_dim == 128 else 1]:
                tiling = tiling_for(LatentGrid(3, 20, 40), tile, block_size, text=77)
                q, k, v = torch.zeros(3, 1, tiling.tokens, 2, head_dim, dtype=dtype)
                means = torch.zeros(1, 2, tiling.video_tiles, head_dim)
                keep = torch.ones(1, 2, tiling.tiles, tiling.tiles, dtype=torch.bool)
                problem = Problem(q, k, v, keep, tiling, tail=Tail(means, means), scale=0.1)
                call = triton_backend.Call.prepare(problem, want_lse=True)
                assert call.access == access
                for config in triton_configs.configs_for(access, dtype, head_dim, block_size):
                    compiled.clear()
                    about = {"access": access, "head_dim": head_dim, "block": block_size, "dtype": str(dtype)}
                    about["config"] = str(config)
                    try:
                        call.launch(config)
                    except DoesNotCompile as error:
                        found.append({**about, "kernel": "forward", "error": str(error)})
                    found += [{**about, **machine_code(kernel)} for kernel in compiled]
        compiled.clear()
        q = torch.zeros(1, tiling.tokens, 2, 128, dtype=torch.bfloat16)
        triton_draft.pool(q, tiling)
        triton_draft.select_draft(torch.zeros(1, 2, 600, 600), torch.full((2,), 0.2, dtype=torch.float64))
        triton_backend.list_tiles(keep, tiling, entries=call.tables.kinds, tail=True)
        compile_probe()
        found += [{"access": access, **machine_code(kernel)} for kernel in compiled]
    return found


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
