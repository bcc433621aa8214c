"""Memory that does not suffice, told in one line with the size that is needed at least."""

from __future__ import annotations

import re
from pathlib import Path

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = r"([\d.]+) (bytes|KiB|MiB|GiB)"
# PyTorch on a CPU and on a GPU, and NumPy.
_WANTED = re.compile(rf"(?:tried to allocate|Unable to allocate) {_SIZE}", re.IGNORECASE)
_IN_USE = re.compile(rf"this process has {_SIZE} memory in use", re.IGNORECASE)


def told(error: Exception) -> str | None:
    """The line, or None for another error."""
    text = str(error)
    wanted = _WANTED.search(text)
    on_gpu = type(error).__name__ == "OutOfMemoryError"  # torch's, which may not be imported
    if not on_gpu and not isinstance(error, MemoryError) and not (wanted and "CPUAllocator" in text):
        return None
    if wanted is None:
        return f"not enough memory: {text or 'an allocation failed'}"
    in_use = _IN_USE.search(text)
    held = _bytes(*in_use.groups()) if in_use else 0 if on_gpu else _largest_so_far()
    place = "on the GPU" if on_gpu else "of memory"
    return (
        f"not enough memory: at least {(held + _bytes(*wanted.groups())) / 1e9:.2g} GB {place} are needed; "
        "a smaller size or batch and, on a GPU, --offload need less"
    )


def _bytes(number: str, unit: str) -> float:
    return float(number) * _UNITS[unit]


def _largest_so_far() -> int:
    """The most memory that this process has had, in bytes, of the kind that is limited; 0 where nothing tells."""
    try:
        import resource
    except ImportError:
        return 0
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    status = Path("/proc/self/status")
    peak = re.search(r"VmPeak:\s*(\d+) kB", status.read_text(encoding="utf-8") if status.exists() else "")
    return int(peak[1]) * 1024 if peak else 0
