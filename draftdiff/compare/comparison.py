"""What comparisons of video, pictures and text have in common: rows, notes, a table, and a folder of results."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from draftdiff.compare.table import Column, text_table
from draftdiff.errors import UserError
from draftdiff.files import prepare_folder, replacing_folder

Result = TypeVar("Result")


class Comparison(ABC, Generic[Result]):
    """Results, that which the others are compared with first. about: where and with what it ran."""

    made_by: ClassVar[str]  # the command, by which its folder is known again
    columns: ClassVar[Sequence[Column]]
    results: list[Result]
    about: dict[str, Any]

    @abstractmethod
    def row(self, result: Result) -> dict[str, Any]:
        """The figures of one result, by the keys of the columns; None for what does not apply or cannot be had."""

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """Everything but frames and pictures, ready for JSON."""

    @property
    def baseline(self) -> Result:
        return self.results[0]

    def rows(self) -> list[dict[str, Any]]:
        return [self.row(result) for result in self.results]

    def summary(self) -> list[str]:
        """What the table shows besides its figures."""
        return []

    def notes(self) -> list[str]:
        """What a reader of the table should know."""
        return []

    def table(self) -> str:
        """Aligned columns for a terminal; columns without a value are left out."""
        lines = [*text_table(self.rows(), self.columns), *self.summary(), *self.notes()]
        return "\n".join(line.rstrip() for line in lines)

    def to_dict(self) -> dict[str, Any]:
        return {"made_by": self.made_by, **self.content(), "about": self.about}

    def write(self, folder: Path | str, fill: Callable[[Any, Path], None]) -> Path:
        """Write a folder of results.json, in which values that JSON lacks become text, and what a page's `fill` adds.

        It is new or takes the place of an earlier one, whole or not at all. Raises UserError as `check_folder` does,
        and ValueError for NaN or inf.
        """
        folder = Path(folder)
        check_folder(folder, self.made_by)
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False, default=str)
        with replacing_folder(folder) as partial:
            (partial / "results.json").write_text(text + "\n", encoding="utf-8")
            fill(self, partial)
        return folder


def check_folder(folder: Path, made_by: str) -> None:
    """Raise UserError unless the folder is new, empty, or was made by the same command, and can be written."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {str(folder)!r} is a file, not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not _is_from(folder, made_by):
        raise UserError(f"output folder {str(folder)!r} holds other files; name a new or an empty one")
    prepare_folder(folder.absolute().parent)


def _is_from(folder: Path, made_by: str) -> bool:
    try:
        return json.loads((folder / "results.json").read_text(encoding="utf-8"))["made_by"] == made_by
    except (OSError, ValueError, KeyError, TypeError):
        return False
