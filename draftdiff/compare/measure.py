"""What a call costs besides its time: peak memory and floating-point operations."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

_CLEAR_PEAK = Path("/proc/self/clear_refs")  # Linux: writing 5 resets the peak of the resident memory
_STATUS = Path("/proc/self/status")
T = TypeVar("T")


def peak_memory(call: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """What a call returns, and the most bytes that it had in use above what was in use before.

    Of tensors on a GPU, of the whole process on a CPU; None where that cannot be known.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return call(), torch.cuda.max_memory_allocated(device) - before
    if not os.access(_CLEAR_PEAK, os.W_OK):
        return call(), None
    _return_freed_memory()
    _CLEAR_PEAK.write_text("5")
    before = _resident("VmRSS")
    result = call()
    return result, _resident("VmHWM") - before


def _return_freed_memory() -> None:
    """What the C library keeps for later would hide the next call's need."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (most) of this process, in bytes."""
    lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def count_flops(call: Callable[[], T]) -> tuple[T, int]:
    """What a call returns, and the floating-point operations of its products, convolutions and attentions (a
    multiply-add is two), on shapes as they really were."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        result = call()
    return result, counter.get_total_flops()


def _attention_flops(query: Any, key: Any, value: Any, *_args: Any, **_kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


# PyTorch counts the kernels of GPUs only.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
