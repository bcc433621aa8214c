"""What commands print and write when they are done."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from draftdiff.errors import user_errors


def note(text: str) -> None:
    """Tell what is not an error."""
    print(f"draftdiff: note: {text}", file=sys.stderr)


def deliver(comparison: Any, write: Callable[[Any, Path], Any], folder: Path, options: Namespace) -> int:
    """Print a comparison as a table, or as JSON, and write its folder; the exit code."""
    # Printed before it is written: hours of runs should not be lost to a full disk.
    print(json.dumps(comparison.to_dict(), default=str) if options.json else comparison.table())
    with user_errors(OSError):
        write(comparison, folder)
    if not options.json:
        print(folder / "report.html")
    return 0
