"""What scripts share on the command line: kinds of arguments, and mistakes and Ctrl-C that end in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from draftdiff.files import check_output, check_writable
from draftdiff.models.devices import find_device, one_line


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(f"{self.prog}: {message}")

    @contextmanager
    def mistakes(self) -> Iterator[None]:
        """Around checks and loading: a ValueError in there is the user's."""
        try:
            yield
        except ValueError as error:
            self.error(one_line(error))


def run(main: Callable[[], int | None]) -> NoReturn:
    """End the process with what a script's `main` returns, or with 130 after Ctrl-C."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).stem}: interrupted", file=sys.stderr)
        sys.exit(130)


def whole(least: int) -> Callable[[str], int]:
    """Whole numbers from `least` on."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, got {text!r}")
        return number

    return read


def share(text: str) -> float:
    """A number from 0 on and below 1."""
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text!r}")
    return number


def device(text: str) -> torch.device:
    """A device that is here."""
    return _checked(find_device, text)


def new_file(*suffixes: str) -> Callable[[str], Path]:
    """A file that can be written, with one of these endings; none: with any."""

    def read(text: str) -> Path:
        path = Path(text)
        _checked(lambda path: check_output(path, suffixes or (path.suffix.lower(),)), path)
        return path

    return read


def check_new_folder(path: Path) -> None:
    """Raise ValueError if there is something at `path`, or no folder can be made there."""
    if path.exists():
        raise ValueError(f"{path} exists: choose a new folder with -o")
    check_writable(next(parent for parent in path.absolute().parents if parent.exists()))


def _checked(check: Callable[[Any], Any], value: Any) -> Any:
    try:
        return check(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None  # the only kind of which argparse shows the text
