"""Where and in what numbers to compute: devices, dtypes and versions by the names that people use for them."""

from __future__ import annotations

import os
import platform
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch

from draftdiff._version import __version__
from draftdiff.core.devices import dtype_named
from draftdiff.errors import UserError, one_line

_ACCELERATORS = ("cuda", "mps", "xpu", "hpu", "npu")
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "triton")


def find_device(name: str | None) -> torch.device:
    """The device of that name; CUDA if there is, else the CPU, for None. Raises UserError for one that is not here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # which "meta" cannot
    except Exception as error:  # torch raises a different class for every kind of device that is not there
        raise UserError(f"device {name!r} cannot be used: {one_line(error)}") from None
    return device


def devices() -> list[torch.device]:
    """The CPU, and every accelerator here that this PyTorch knows."""
    found = [torch.device("cpu")]
    for kind in _ACCELERATORS:
        module = getattr(torch, kind, None)  # "hpu" and "npu" come with plugins
        found += [torch.device(kind, index) for index in range(module.device_count() if module else 0)]
    return found


def find_dtype(name: str | None, device: torch.device, *, embedded: bool) -> torch.dtype:
    """The dtype of that name; for None float32 on a CPU and for an embedded model, whose weights are few, else
    bfloat16. Raises UserError for another name."""
    if name is not None:
        return dtype_named(name)
    return torch.float32 if embedded or device.type == "cpu" else torch.bfloat16


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
    name = getattr(torch.get_device_module(device), "get_device_name", None)  # "mps" has none
    return name(device) if name else device.type


def about(device: torch.device, dtype: torch.dtype, command: str) -> dict[str, Any]:
    """Where and with what a comparison ran."""
    return {
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": versions(),
        "command": command,
    }


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    if table.is_file():
        for line in table.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
