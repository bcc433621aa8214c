"""The user's cache of compiled kernels and measured choices.

A file counts only if this user owns it and its folder, and nobody else can write to either: what is loaded from here is
run. Where nothing can be kept (no home, no room, someone else's folder) that is said once, and the work goes on.
"""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from pathlib import Path

from draftdiff.files import is_ours, is_private, replacing


def stored(name: str) -> Path | None:
    """The file of that name, or None if there is none that this user alone could have written."""
    try:
        path = _folder() / name
        return path if path.is_file() and is_private(path) else None
    except OSError as error:
        _say_once(str(error))
        return None


def store(name: str, content: bytes) -> Path | None:
    """Keep a file, whole or not at all; None where it cannot be kept."""
    try:
        path = _folder() / name
        with replacing(path) as partial:
            partial.write_bytes(content)
            partial.chmod(0o600)
    except OSError as error:
        _say_once(str(error))
        return None
    return path


def _folder() -> Path:
    """A folder of this user alone. Raises OSError where there can be none."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # no home
        raise OSError(str(error)) from None
    folder = (base / "draftdiff").resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_ours(folder):
        raise PermissionError(f"{folder} belongs to another user")
    if not is_private(folder):
        folder.chmod(0o700)
    return folder


@lru_cache(maxsize=8)
def _say_once(reason: str) -> None:
    logging.getLogger("draftdiff").warning("compiled kernels cannot be kept for the next run: %s", reason)
