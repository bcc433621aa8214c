"""What kinds of device differ in."""

from __future__ import annotations

import torch


def exact_dtype(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device, for budgets: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
