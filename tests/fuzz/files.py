"""Damaged files before every reader: they load, or are refused in one line; never a traceback."""

from __future__ import annotations

import json
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from draftdiff.errors import UserError
from draftdiff.kernels import autotune
from draftdiff.llm import DistillationSet, NGramTable, load_trimmed, save_trimmed, trim
from draftdiff.models.image_calibration import with_calibration
from draftdiff.var.checkpoint import read_checkpoint
from tests.fuzz.engine import Case, Family
from tests.llm.tiny_models import tiny_model

WEIGHTS = {f"blocks.{i}.weight": torch.arange(12.0).view(3, 4) + i for i in range(3)} | {
    "pos_1LC": torch.zeros(1, 5, 2)
}
MISSED = [[[[None] * 12] * 2, [[0.5] * 12] * 2]] * 4
# Where a number of a JSON file once stood, and what may stand there after another program has been at it.
FOREIGN = [
    "null",
    "[]",
    "{}",
    '"x"',
    "-1",
    "1e400",
    "0.5",
    "true",
    "[1, [2]]",
    '{"a": {"b": 1}}',
    "9" * 400,
    "\u00e9",
    "",
]


@dataclass(frozen=True)
class _Sizes:
    num_layers: int = 4
    num_attention_heads: int = 2


@dataclass(frozen=True)
class _Model:
    """As much of an image model as a file of drafters is checked against."""

    drafters: dict[str, Any] = field(default_factory=dict)
    refiner: None = None

    @property
    def pipeline(self) -> Any:
        return Namespace(transformer=Namespace(config=_Sizes()))


def _write_shards(folder: Path) -> None:
    folder.mkdir()
    names = list(WEIGHTS)
    for i, part in enumerate((names[:2], names[2:])):
        save_file({name: WEIGHTS[name] for name in part}, folder / f"part-{i}.safetensors")
    placed = {name: f"part-{int(i > 1)}.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def _drafters(path: Path) -> Any:
    return with_calibration(_Model(), path)  # type: ignore[arg-type]


def _tuned(path: Path) -> Any:
    autotune._known.cache_clear()
    with mock.patch.object(autotune, "_file", return_value=path):
        known = autotune._known(torch.device("cpu"))
    assert isinstance(known, dict)
    return known


def _set(path: Path) -> None:
    rows = [torch.arange(n) for n in (3, 5, 1)]
    DistillationSet(rows, [row > 1 for row in rows]).save(path)


def _legacy(path: Path) -> None:
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)


# By name: the file's name, how it is written, how it is read.
READERS: dict[str, tuple[str, Callable[[Path], Any], Callable[[Path], Any]]] = {
    "pth": ("a.pth", lambda path: torch.save(WEIGHTS, path), read_checkpoint),
    "legacy pth": (
        "b.pth",
        lambda path: torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False),
        read_checkpoint,
    ),
    "safetensors": ("c.safetensors", lambda path: save_file(WEIGHTS, path), read_checkpoint),
    "shards": ("shards", _write_shards, read_checkpoint),
    "n-grams": ("d.safetensors", lambda path: NGramTable([[1, 2, 3, 4, 1, 2, 5]]).save(path), NGramTable.load),
    "distillation set": ("e.safetensors", _set, DistillationSet.load),
    "trimmed draft": (
        "trimmed",
        lambda path: save_trimmed(trim(tiny_model(layers=1, hidden=16, vocab_size=32), torch.arange(32), 8), path),
        load_trimmed,
    ),
    "drafters": (
        "drafters.json",
        lambda path: path.write_text(json.dumps({"layers": 4, "drafters": {"3": [0, 1], "5": [2]}, "missed": MISSED})),
        _drafters,
    ),
    "autotune": ("tuned.json", lambda path: path.write_text(json.dumps({"3.4 hopper": "Config(64)"})), _tuned),
}


@dataclass(frozen=True, repr=False)
class FileCase(Case):
    """What is done to one file, in this order; places are shares of its length.

    file: which of a folder's files, by its number.  Damages: ("cut", place), ("flip", place, bits), ("fill", place,
    byte), ("swap", another reader, number of its file), ("text", place, what stands there then).
    """

    reader: str
    damages: tuple[tuple, ...]
    file: int = 0


_places = st.integers(0, 999).map(lambda n: n / 1000)
_damages = st.one_of(
    st.tuples(st.just("cut"), _places),
    st.tuples(st.just("flip"), _places, st.integers(1, 255)),
    st.tuples(st.just("flip"), _places.map(lambda n: n / 20), st.integers(1, 255)),  # headers stand first
    st.tuples(st.just("fill"), _places, st.sampled_from([0, 255])),
    st.tuples(st.just("swap"), st.sampled_from(sorted(READERS)), st.integers(0, 3)),
    st.tuples(st.just("text"), _places, st.sampled_from(FOREIGN)),
)
_cases = st.builds(
    FileCase, st.sampled_from(list(READERS)), st.lists(_damages, min_size=1, max_size=2).map(tuple), st.integers(0, 3)
)


@lru_cache(maxsize=1)
def _whole_files() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="draftdiff-fuzz-"))
    for name, write, _ in READERS.values():
        write(folder / name)
    return folder


def _file_of(path: Path, number: int) -> Path:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return files[number % len(files)]


def _damaged(content: bytes, damage: tuple) -> bytes:
    kind, where, *rest = damage
    if kind == "swap":
        return _file_of(_whole_files() / READERS[where][0], rest[0]).read_bytes()
    at = int(where * len(content))
    if kind == "cut":
        return content[:at]
    if kind == "flip":
        return content[:at] + bytes([byte ^ rest[0] for byte in content[at : at + 1]]) + content[at + 1 :]
    if kind == "fill":
        return content[:at] + bytes([rest[0]] * min(16, len(content) - at)) + content[at + 16 :]
    new = rest[0].encode("latin-1")
    # In place of the number or word that begins behind the place, as another program would write it.
    tokens = [i for i in range(at, len(content)) if content[i : i + 1].isalnum()]
    if not tokens:
        return content + new
    end = tokens[0]
    while end < len(content) and content[end : end + 1].isalnum():
        end += 1
    return content[: tokens[0]] + new + content[end:]


def check_files(case: FileCase) -> str:
    """Raise unless a damaged file loads or is refused; returns which."""
    name, _, read = READERS[case.reader]
    with tempfile.TemporaryDirectory() as folder:
        path, whole = Path(folder) / name, _whole_files() / name
        if whole.is_dir():
            shutil.copytree(whole, path)
        else:
            shutil.copyfile(whole, path)
        file = _file_of(path, case.file)
        content = file.read_bytes()
        for damage in case.damages:
            content = _damaged(content, damage)
        file.write_bytes(content)
        try:
            read(path)
        except (UserError, FileNotFoundError) as error:
            if "\n" in str(error):
                raise AssertionError(f"more than one line: {error}") from error
            return f"{case.reader} refused"
    return f"{case.reader} loads"


FILES = Family("files", _cases, check_files, batch=100)
