"""Files and folders that are written whole or not at all.

Everything is made in a private folder beside its target, forced to the disk, and renamed: after an exception, Ctrl-C
included, what was there before is there still, and nothing else. What a killed process left is removed by the next
write to the same folder.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from draftdiff.errors import NotWritten, UserError

_PREFIX, _LOCK = ".draftdiff.", "lock"
_NEWBORN = 1.0  # seconds in which its owner takes the lock of a new folder
# What libraries that write by themselves raise instead of an OSError: safetensors, and torch.save.
_WRITE_ERRORS = re.compile(r"\(os error (?P<number>\d+)\)|PytorchStreamWriter|inline_container")


def prepare_file(path: Path, suffixes: tuple[str, ...]) -> None:
    """Make the folder of a file that is to be written. Raises UserError, in one line, if it cannot be."""
    if path.suffix.lower() not in suffixes:
        raise UserError(f"output {str(path)!r} must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"output {str(path)!r} is a folder")
    prepare_folder(path.parent)


def prepare_folder(folder: Path) -> None:
    """Make a folder, and those above it. Raises UserError, in one line, if it cannot be made or takes no files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Trying is the only sure test: permission bits say nothing about root or a read-only disk.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output folder {str(folder)!r} cannot be written: {error.strerror}") from None


def is_ours(path: Path) -> bool:
    """Whether this user owns a file or folder, itself and not what a link names."""
    found = path.lstat()
    # Windows keeps owners elsewhere.
    return not stat.S_ISLNK(found.st_mode) and (os.name == "nt" or found.st_uid == os.geteuid())


def is_private(path: Path) -> bool:
    """Whether it is ours and nobody else can write to it."""
    return is_ours(path) and (os.name == "nt" or not path.lstat().st_mode & (stat.S_IWGRP | stat.S_IWOTH))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file to, which becomes `path` at the end. Raises NotWritten, for a full disk say."""
    with _private_folder(path) as private:
        partial = private / "new" / path.name
        partial.parent.mkdir()
        yield partial
        _sync(partial)
        os.replace(partial, path)
    _sync(path.absolute().parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` at the end; its parents are made.

    Raises FileExistsError if there is something at `path`, and NotWritten.
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
    """A folder to fill, which takes the place of the one at `path`, or of none, at the end. Raises NotWritten."""
    with _private_folder(path) as private:
        new, old = private / "new", private / "old" / path.name
        new.mkdir()
        old.parent.mkdir()
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
    """Beside it, so that a rename stays on one disk. Its lock tells others that its owner lives."""
    from filelock import FileLock

    parent = path.absolute().parent
    _remove_stale(parent)
    made = tempfile.TemporaryDirectory(dir=parent, prefix=_PREFIX, ignore_cleanup_errors=True)
    with _telling(path), made as folder, FileLock(Path(folder, _LOCK)):
        yield Path(folder)


def _remove_stale(parent: Path) -> None:
    """Remove the private folders of this user's processes that were killed, and put back what one had moved away."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            if not folder.is_dir() or not is_private(folder) or not _is_abandoned(folder):
                continue
            for old in folder.glob("old/*"):
                if not (parent / old.name).exists():
                    old.rename(parent / old.name)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # another process was quicker
            continue


def _is_abandoned(folder: Path) -> bool:
    from filelock import FileLock, Timeout

    if time.time() - folder.stat().st_mtime < _NEWBORN:
        return False
    try:
        with FileLock(folder / _LOCK, timeout=0):
            return True
    except Timeout:
        return False


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """An error of writing names the file that was to be, whichever library it comes from."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and _PREFIX not in str(error.filename)):
            raise  # not of writing
        raise NotWritten(error.errno, error.strerror or str(error), str(path)) from error
    except Exception as error:
        told = _WRITE_ERRORS.search(str(error))
        if told is None:
            raise
        number = int(told["number"] or errno.EIO)
        raise NotWritten(number, os.strerror(number), str(path)) from error


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
