"""What the benchmark scripts share: to time a call, to sum up repeats, to name and write results."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from draftdiff.doctor import versions as versions
from draftdiff.media import replacing

RESULTS = Path(__file__).resolve().parent / "results"
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
