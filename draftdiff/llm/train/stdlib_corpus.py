"""A corpus of program text that every machine has: the Python standard library's own sources.

Tests, character tables and generated files are left out. One file in twenty, by the hash of its name, is held out. The
text, and with it every figure, differs a little between Python versions; results name the version.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from draftdiff.errors import UserError

LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__")
HELD_OUT_PER_MILLE = 50
PYTHON = sysconfig.get_python_version()


def corpus_files(held_out: bool = False) -> list[Path]:
    """The source files of one side of the split, in order of their names."""
    home = Path(sysconfig.get_path("stdlib"))
    files = []
    for file in home.rglob("*.py"):
        name = file.relative_to(home).as_posix()
        generated = "_sysconfigdata" in name or "/config-" in f"/{name}"  # these name the machine's own folders
        if generated or set(file.relative_to(home).parts) & set(LEFT_OUT):
            continue
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        if (digest % 1000 < HELD_OUT_PER_MILLE) == held_out:
            files.append((name, file))
    return [file for _, file in sorted(files)]


def corpus_texts(held_out: bool = False) -> Iterator[str]:
    """The texts of `corpus_files`, each decoded as its own coding line says."""
    for file in corpus_files(held_out):
        with tokenize.open(file) as source:
            yield source.read()


def def_prompts(count: int, held_out: bool = True) -> list[str]:
    """Heads of functions, from `def ` to the colon, spread evenly over the files of one side of the split."""
    heads = [head for text in corpus_texts(held_out) for head in re.findall(r"^def \w+\([^()]*\):$", text, re.M)]
    heads = list(dict.fromkeys(heads))
    if not 1 <= count <= len(heads):
        raise UserError(f"count must be from 1 to {len(heads)}, the function heads there are, got {count}")
    return [heads[i * len(heads) // count] for i in range(count)]
