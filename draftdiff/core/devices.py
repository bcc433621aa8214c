"""What kinds of device differ in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def exact_dtype(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device, for budgets: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Our dtypes are our own; a surrounding autocast would change those of some products."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
