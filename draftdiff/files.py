"""Files and folders that are written whole or not at all.

Everything is made in a private folder beside its target, forced to the disk, and renamed: after an exception, Ctrl-C
included, what was there before is there still, and nothing else.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from draftdiff.errors import UserError


def check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raise UserError, in one line, if a file of this name cannot be written."""
    if path.suffix.lower() not in suffixes:
        raise UserError(f"output {str(path)!r} must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"output {str(path)!r} is a folder")
    check_writable(path.parent)


def check_writable(folder: Path) -> None:
    """Raise UserError if the folder is not there or takes no files."""
    if not folder.is_dir():
        raise UserError(f"output folder {str(folder)!r} does not exist")
    try:
        # Trying is the only sure test: permission bits say nothing about root or a read-only disk.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output folder {str(folder)!r} cannot be written: {error.strerror}") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file to, which becomes `path` at the end. Raises OSError, for a full disk say."""
    with _private_folder(path) as private:
        partial = private / path.name
        yield partial
        _sync(partial)
        os.replace(partial, path)
    _sync(path.absolute().parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` at the end; its parents are made.

    Raises FileExistsError if there is something at `path`.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists: choose a new folder")
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with _private_folder(path) as private:
        new = private / "new"
        new.mkdir()
        yield new
        _sync_tree(new)
        new.rename(path)  # fails where another has come in the meantime
    _sync(path.absolute().parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of the one at `path`, or of none, at the end."""
    with _private_folder(path) as private:
        new, old = private / "new", private / "old"
        new.mkdir()
        yield new
        _sync_tree(new)
        try:
            if path.exists():
                path.rename(old)
            new.rename(path)
        finally:
            if old.exists() and not path.exists():
                old.rename(path)
    _sync(path.absolute().parent)


@contextmanager
def _private_folder(path: Path) -> Iterator[Path]:
    """Beside it, so that a rename stays on one disk."""
    parent = path.absolute().parent
    with tempfile.TemporaryDirectory(dir=parent, prefix=".draftdiff.", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _sync_tree(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        _sync(path)


def _sync(path: Path) -> None:
    """Without it a new name may survive a power cut that the content does not."""
    windows = os.name == "nt"
    if path.is_symlink() or (windows and path.is_dir()):
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some disks, of a network for example, know no such thing for folders.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
