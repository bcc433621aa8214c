"""What commands print and write when they are done."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def note(text: str) -> None:
    """Tell what is not an error."""
    print(f"draftdiff: note: {text}", file=sys.stderr)


def print_json(result: dict[str, Any], device: torch.device) -> None:
    """One JSON object, with where and with what it was made."""
    from draftdiff.models.devices import device_name, versions

    print(json.dumps({**result, "device": device_name(device), "versions": versions()}, default=str))


def deliver(comparison: Any, write: Callable[[Any, Path], Any], folder: Path, options: Namespace) -> int:
    """Print a comparison as a table, or as JSON, and write its folder; the exit code."""
    # Printed before it is written: hours of runs should not be lost to a full disk.
    print(json.dumps(comparison.to_dict(), default=str) if options.json else comparison.table())
    write(comparison, folder)
    if not options.json:
        print(folder / "report.html")
    return 0
