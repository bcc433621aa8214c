"""What the benchmark scripts share: time and memory of a call, spread of repeats, names and files of results."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from draftdiff.files import replacing
from draftdiff.models.devices import versions as versions

RESULTS = Path(__file__).resolve().parent / "results"
_CLEAR_PEAK = Path("/proc/self/clear_refs")  # Linux: writing 5 resets the peak of the resident memory
T = TypeVar("T")


def device_slug(device: torch.device) -> str:
    """The device's name as the start of a file name: "cpu", "nvidia-h100-80gb-hbm3"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_result(path: Path, payload: dict[str, Any]) -> None:
    """Write a result as JSON, whole or not at all. Raises ValueError for NaN or inf in it."""
    text = json.dumps(payload, indent=1, allow_nan=False)
    with replacing(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def draw_beside(path: Path, payload: dict[str, Any], plotter: str) -> None:
    """The plot of a result beside its file, by `plot` of the module `plotter`; a line instead without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{Path(sys.argv[0]).name}: no plot without matplotlib: pip install 'draftdiff[plots]'", file=sys.stderr)
        return
    importlib.import_module(plotter).plot(payload, path.with_suffix(".png"))


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What a call returns, and the seconds until its work on the device was done."""
    if device.type != "cuda":
        started = time.perf_counter()
        result = call()
        return result, time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    result = call()
    end.record()
    end.synchronize()
    return result, start.elapsed_time(end) / 1000


def median_and_spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most of some repeats."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def reset_peak_memory(device: torch.device) -> None:
    """Forget the most memory that was in use so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access(_CLEAR_PEAK, os.W_OK):
        _CLEAR_PEAK.write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Most bytes in use since the last reset: of tensors on a GPU, of the whole process on a CPU; None if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not os.access(_CLEAR_PEAK, os.W_OK):
        return None
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
