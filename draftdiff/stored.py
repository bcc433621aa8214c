"""Files that others wrote, read without trust: by what is in them and not by their names, and nothing in them is run.

Whatever is wrong with one is a UserError in one line that names the file; one that is not there a FileNotFoundError.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from draftdiff.errors import UserError, one_line

_LFS = b"version https://git-lfs"
# What stands where weights were expected, by how it begins.
_OTHERS = {
    _LFS: "is a Git LFS pointer instead of the file: run git lfs pull",
    b"<": "is a web page, probably of a failed download",
    b"{": "is JSON text",
    b"\x1f\x8b": "is compressed: unpack it first",
}


def read_weights(path: str | Path, what: str = "checkpoint") -> Any:
    """What safetensors or torch.save have written, tensors on the CPU. what: the file is meant to be."""
    path = Path(path)
    head = _head(path, what)
    # A header of safetensors is its length in 8 bytes and then JSON; a zip file begins with PK.
    kind = "safetensors" if head[8:9] == b"{" else "zip" if head[:2] == b"PK" else "pickle"
    other = next((said for start, said in _OTHERS.items() if head.lstrip().lower().startswith(start)), None)
    if kind == "pickle" and other is not None:
        raise UserError(f"{path} {other}")
    try:
        if kind == "safetensors":
            return load_file(path)
        return _unpickled(path, mapped=kind == "zip" and path.suffix != ".safetensors")
    except Exception as error:  # damage ends anywhere in the two readers, and nothing of ours is in there
        raise UserError(f"{path} {_unreadable(error, what)}") from None


def _unpickled(path: Path, mapped: bool) -> Any:
    """mapped: read as needed, which torch.load does for paths only; but then it goes by their suffix."""
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what fails is said once, by us
        return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)


def read_tensors(
    path: str | Path, what: str, forms: Mapping[str, tuple[torch.dtype, tuple[int | None, ...]]]
) -> dict[str, Tensor]:
    """The tensors of a table of ours. forms: dtype and shape of each, None for a length that may be any."""
    content = read_weights(path, what)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} is not a readable {what}: it holds a {type(content).__name__}")
    for name, (dtype, shape) in forms.items():
        tensor = content.get(name)
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path} is not a readable {what}: it lacks {name}")
        fits = len(shape) == tensor.ndim and all(n in (None, m) for n, m in zip(shape, tensor.shape))
        if tensor.dtype != dtype or tensor.layout != torch.strided or tensor.is_meta or not fits:
            expected = ", ".join("any" if n is None else str(n) for n in shape)
            raise UserError(
                f"{path} is not a readable {what}: {name} is {tensor.dtype} {list(tensor.shape)} "
                f"instead of {dtype} [{expected}]"
            )
    return {name: content[name] for name in forms}


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """The object of a JSON file. what: the file is meant to be."""
    path = Path(path)
    _head(path, what)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a readable {what}: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a readable {what}: it holds a {type(content).__name__}")
    return content


def lfs_pointer(folder: str | Path) -> str | None:
    """What to say of a folder that was cloned without its large files, None of any other."""
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(_LFS):
            return f"{path} {_OTHERS[_LFS]}"
    return None


def inside(folder: Path, name: str) -> Path:
    """The file of that name in a folder. Raises UserError for a name that leads out of it: an index that came with the
    folder says nothing about other files.

    The hub's cache counts as one folder: its snapshots are links to the blobs beside them.
    """
    home = folder.resolve()
    path = (home / name).resolve()
    homes = [home, *(parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots")]
    if Path(name).is_absolute() or ".." in Path(name).parts or not any(path.is_relative_to(place) for place in homes):
        raise UserError(f"{folder} names {name!r}, which is not inside it")
    return folder / name


def _head(path: Path, what: str) -> bytes:
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder, not a {what}")
        if not path.is_file():
            raise FileNotFoundError(f"no {what} at {path}")
        with path.open("rb") as file:
            head = file.read(256)
    except FileNotFoundError:
        raise
    except OSError as error:  # also of a name that is too long for a file
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not head:
        raise UserError(f"{path} is empty")
    return head


def _unreadable(error: Exception, what: str) -> str:
    if found := re.search(r"GLOBAL ([A-Za-z_][\w.]*)", str(error), re.ASCII):
        return (
            f"holds a {found[1]} beside its weights, which could run code and is not loaded: "
            "save the weights alone, as by torch.save(checkpoint['model'], 'weights.pth')"
        )
    if "TorchScript" in str(error):
        return "is a TorchScript program: save the weights alone, as by torch.save(model.state_dict(), 'weights.pth')"
    return f"is not a readable {what} (damaged, truncated or of another kind): {one_line(error)}"
