"""What users give for numbers and sequences, as Python's own."""

from __future__ import annotations

import math
from typing import Any

from draftdiff.errors import UserError


def plain(value: Any) -> Any:
    """Lists as tuples, numbers and arrays of other libraries as Python's; anything else as it is."""
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(plain, value))
    # NumPy's scalars and arrays, and tensors, have one name for it.
    return plain(value.tolist()) if hasattr(value, "tolist") else value


def shown(value: Any) -> str:
    """As an error tells it: of what is long the beginning."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_number(value: Any) -> bool:
    """Whether it is a finite number of Python's, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Whether it is an int of Python's, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole(name: str, value: Any) -> int:
    """A whole number as Python's. Raises ValueError with its name for anything else."""
    found = plain(value)
    if not is_whole(found):
        raise UserError(f"{name} must be a whole number, got {shown(value)}")
    return found
