"""Whether every Triton kernel compiles for cards that need not be here, before a card's first minute."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from draftdiff.bench.runner import Routine
from draftdiff.compare.table import Column, text_table
from draftdiff.errors import UserError

COLUMNS: tuple[Column, ...] = (
    ("compute capability", "capability", str, ""),
    ("kernels", "kernels", str, ""),
    ("seconds", "seconds", "{:.0f}".format, ""),
    ("", "wrong", lambda wrong: f"{len(wrong)} WRONG" if wrong else "", ""),
)


class CompileAhead(Routine):
    name = "compile"
    file = "compile"

    def cases(self) -> list[int]:
        if not importlib.util.find_spec("triton") or not importlib.util.find_spec("triton.backends.nvidia"):
            raise UserError("bench compile needs Triton with its compiler for NVIDIA GPUs, which is not installed")
        return list(self.options.capability)

    def measure(self, case: int) -> list[dict[str, Any]]:
        """In a process of its own: Triton compiles for one card in each."""
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "draftdiff.kernels.ahead", str(case)]
        started = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        row: dict[str, Any] = {"capability": case, "seconds": time.perf_counter() - started}
        if done.returncode:
            *_, last = done.stderr.strip().splitlines() or ["it ended without a word"]
            row |= {"kernels": 0, "wrong": [last]}
        else:
            kernels = json.loads(done.stdout)
            row |= {"kernels": len(kernels), "wrong": [kernel["error"] for kernel in kernels if "error" in kernel]}
        self.failures += [f"compute capability {case}: {reason}" for reason in row["wrong"]]
        return [row]

    def table(self, payload: Mapping[str, Any]) -> Iterable[str]:
        return text_table(payload["rows"], COLUMNS)
