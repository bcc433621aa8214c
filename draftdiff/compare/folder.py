"""The folder that a comparison writes: new, or in place of an earlier one of its kind, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from draftdiff.errors import UserError
from draftdiff.files import check_writable, replacing_folder


def check_folder(folder: Path, made_by: str) -> None:
    """Raise UserError unless the folder is new, empty, or was made by the same command, and can be written."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {str(folder)!r} is a file, not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not _is_from(folder, made_by):
        raise UserError(f"output folder {str(folder)!r} holds other files; name a new or an empty one")
    check_writable(folder.absolute().parent)


def _is_from(folder: Path, made_by: str) -> bool:
    try:
        return json.loads((folder / "results.json").read_text(encoding="utf-8"))["made_by"] == made_by
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def results_folder(folder: Path, made_by: str, results: dict[str, Any]) -> Iterator[Path]:
    """The folder that takes the place of `folder`, with results.json in it; values that JSON lacks become text.

    Raises UserError as `check_folder` does, and ValueError for NaN or inf.
    """
    check_folder(folder, made_by)
    text = json.dumps(results, indent=1, allow_nan=False, default=str)
    with replacing_folder(folder) as partial:
        (partial / "results.json").write_text(text + "\n", encoding="utf-8")
        yield partial
