"""What kinds of device differ in, and dtypes by the names that people use for them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from draftdiff.errors import UserError

_DTYPES = {
    **dict.fromkeys(("float32", "fp32", "float"), torch.float32),
    **dict.fromkeys(("float16", "fp16", "half"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
}


def exact_dtype(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device, for budgets: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Our dtypes are our own; a surrounding autocast would change those of some products."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def dtype_named(name: str | torch.dtype, argument: str = "dtype") -> torch.dtype:
    """The floating-point dtype of that name, such as "bfloat16", "bf16" or "torch.bfloat16", or one itself.

    argument: what it was given as. Raises ValueError for anything else.
    """
    if isinstance(name, torch.dtype) and name.is_floating_point:
        return name
    found = _DTYPES.get(name.removeprefix("torch.")) if isinstance(name, str) else None
    if found is None:
        raise UserError(f"{argument} must be one of float32, float16, bfloat16, got {name!r}")
    return found


def chosen_dtype(dtype: str | torch.dtype | None, torch_dtype: str | torch.dtype | None) -> torch.dtype | None:
    """That of an argument's new and old name, None if neither is given. Raises ValueError if they differ, or for what
    is no dtype."""
    found = {
        dtype_named(value, name)
        for name, value in (("dtype", dtype), ("torch_dtype", torch_dtype))
        if value is not None
    }
    if len(found) > 1:
        raise UserError(f"dtype and torch_dtype are one argument, got {dtype} and {torch_dtype}")
    return next(iter(found), None)
