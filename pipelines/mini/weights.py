"""The weights that ship with draftdiff: found whole, checked against their digests, loaded without a word."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers.utils import logging as transformers_logging

from draftdiff.errors import UserError, one_line
from draftdiff.stored import read_json

DEFAULTS_FILE = "draftdiff.json"

Loaded = TypeVar("Loaded")


def settings(title: str, folder: Path) -> dict[str, Any]:
    """What a folder's settings file says. Raises FileNotFoundError or ValueError that names it.

    title: what messages call the model, such as "mini video".
    """
    file = folder / DEFAULTS_FILE
    try:
        return read_json(file, "file of settings")
    except FileNotFoundError:
        raise FileNotFoundError(f"{title} settings are missing: {file}") from None
    except UserError as error:
        raise UserError(f"{title} settings are unreadable: {error}") from None


def load(title: str, folder: Path, files: Sequence[str], loader: Callable[[], Loaded]) -> Loaded:
    """What `loader` makes of a folder that holds these files, whose weights (.safetensors) are as they were shipped.

    A missing file raises FileNotFoundError and a damaged or unfitting one ValueError, each naming it in one line.
    """
    for name in (DEFAULTS_FILE, *files):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{title} weights are missing: {folder / name}")
    digests = settings(title, folder).get("sha256", {})
    for name in files:
        if name.endswith(".safetensors"):
            digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            if digest != digests.get(name):
                raise UserError(
                    f"{title} weights are damaged: {folder / name} does not match its checksum in {DEFAULTS_FILE}"
                )
    try:
        with _no_progress_bars():
            return loader()
    except Exception as error:  # diffusers, transformers and safetensors each have their own
        raise UserError(f"{title} weights cannot be loaded: {folder}: {one_line(error)}") from error


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Loading takes a fraction of a second; the libraries' bars for it would only clutter the terminal."""
    # A language model must not import diffusers for this, and only a library that is there shows bars.
    libraries = [transformers_logging, sys.modules.get("diffusers.utils.logging")]
    shown = [library for library in libraries if library is not None and library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
