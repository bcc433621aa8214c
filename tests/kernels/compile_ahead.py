"""Compiles the Triton kernels for a GPU that need not be there, and reads what the machine code says.

    python -m tests.kernels.compile_ahead 90          # compute capability; prints a JSON list, an entry per kernel
    python -m tests.kernels.compile_ahead 90 every    # not the first configuration alone

Registers, spills and instructions come from the tools inside the triton wheel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import triton
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from draftdiff.kernels.ahead import compiled_for
from draftdiff.kernels.autotune import DoesNotCompile

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PRODUCTS = {90: "HGMMA", 100: "UTC.?MMA"}  # others: HMMA, in 8 bits IMMA
COUNTED = {
    "spills": r"\b(STL|LDL)\b",
    "bulk_tensor_loads": "UTMALDG",
    "arrivals": r"WARPGROUP\.ARRIVE",
    "drains": r"WARPGROUP\.DEPBAR",
    "register_handovers": "USETMAXREG",
}


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


def read_all(capability: int, every: bool) -> list[dict[str, Any]]:
    """An entry for each kernel of `compiled_for`."""
    return [
        {**about, "kernel": "forward", "error": str(kernel)}
        if isinstance(kernel, DoesNotCompile)
        else {**about, **machine_code(kernel, capability)}
        for about, kernel in compiled_for(capability, every)
    ]


if __name__ == "__main__":
    print(json.dumps(read_all(int(sys.argv[1]), sys.argv[2:] == ["every"])))
