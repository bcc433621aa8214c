"""Devices, dtypes and versions by the names that people use for them."""

from __future__ import annotations

import os
import platform
from importlib.metadata import packages_distributions, version
from pathlib import Path

import torch

from draftdiff import __version__

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "triton")


def find_device(name: str | None) -> torch.device:
    """The device of that name; CUDA if there is, else the CPU, for None. Raises ValueError for one that is not here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # which "meta" cannot
    except Exception as error:  # torch raises a different class for every kind of device that is not there
        raise ValueError(f"device {name!r} cannot be used: {one_line(error)}") from None
    return device


def one_line(error: Exception) -> str:
    """An exception's message without line breaks, cut where it grows long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def versions() -> dict[str, str | None]:
    """draftdiff, Python and the packages it stands on; None for one that is not installed."""
    found: dict[str, str | None] = {"draftdiff": __version__, "python": platform.python_version()}
    installed = packages_distributions()
    return found | {name: version(name) if name in installed else None for name in _PACKAGES}


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if device.type == "cpu":
        return f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    return device.type


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    if table.is_file():
        for line in table.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
