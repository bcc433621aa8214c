"""Options: one parser, those that several commands have, and those that the fields of a dataclass make."""

from __future__ import annotations

import argparse
import dataclasses
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from draftdiff.cli.output import note
from draftdiff.errors import UserError
from draftdiff.files import prepare_file, prepare_folder


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors. fill: adds its options, called when its command has been chosen."""

    def __init__(self, *args: Any, fill: Callable[[Parser], None] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fill = fill

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        if self._fill is not None:
            self._fill(self)
            self._fill = None
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


class Once(argparse.Action):
    """An option that may be given once. hint: what to do instead."""

    def __init__(self, *args: Any, hint: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hint = hint

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if getattr(namespace, self.dest, None) is not None:
            parser.error(f"argument {option_string}: given twice; {self.hint}")
        setattr(namespace, self.dest, values)


def add_seed(parser: Any, of: str = "") -> None:
    parser.add_argument("--seed", type=seed, default=0, help=f"{of}-1 draws one and tells it; default: 0")


def add_place(parser: Any) -> None:
    parser.add_argument("--dtype", help="float32, float16 or bfloat16")
    parser.add_argument("--device", help="cuda, cuda:1, cpu, ...")


def seed(text: str) -> int:
    """A seed that PyTorch's generators take; for -1, as elsewhere, one that chance chooses."""
    number = whole(-1, 2**63 - 1)(text)
    if number == -1:
        number = random.SystemRandom().randrange(2**32)
        note(f"seed {number}")
    return number


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Reads whole numbers from `least` on, and up to `most`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {least} {'on' if most is None else f'to {most}'}, got {text!r}"
            )
        return value

    return read


def number(above: float, most: float) -> Callable[[str], float]:
    """Reads numbers above one and at most another."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = above
        if not above < value <= most:
            raise argparse.ArgumentTypeError(f"must be above {above:g} and at most {most:g}, got {text!r}")
        return value

    return read


def share(text: str) -> float:
    """A number from 0 on and below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text!r}")
    return value


def new_file(*suffixes: str) -> Callable[[str], Path]:
    """Reads files that can be written, with one of these endings; none: with any. Their folder is made."""
    return _prepared(lambda path: prepare_file(path, suffixes or (path.suffix.lower(),)))


def made_folder(text: str) -> Path:
    """Reads a folder, which is made, and can be written to."""
    return _prepared(prepare_folder)(text)


def _prepared(prepare: Callable[[Path], None]) -> Callable[[str], Path]:
    def read(text: str) -> Path:
        try:
            prepare(Path(text))
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None  # the only kind of which argparse shows the text
        return Path(text)

    return read


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a dataclass that text can set. kinds: the types of its values that can be written."""

    name: str
    kinds: tuple[Any, ...]
    default: Any
    help: str

    def read(self, text: str) -> Any:
        """The value of the first kind that reads the text. Raises ArgumentTypeError that names the text."""
        for kind in self.kinds:
            try:
                return _value(kind, text)
            except ValueError:  # noqa: PERF203
                continue
        raise argparse.ArgumentTypeError(f"cannot read {text!r}")

    def add_to(self, parser: Any) -> None:
        """Add the option --name; it is None where it was not given."""
        option = f"--{self.name.replace('_', '-')}"
        text = self.help if self.default is None else f"{self.help} (default: {self.default})"
        text = text.replace("%", "%%")
        if self.kinds == (bool,):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            metavar = "|".join(map(_metavar, self.kinds))
            parser.add_argument(option, type=self.read, metavar=metavar, help=text)


def fields_of(config: type) -> dict[str, Field]:
    """The fields of a dataclass that text can set, by name; their help is what their metadata or its docstring says."""
    hints, found = get_type_hints(config), {}
    fields = dataclasses.fields(config)
    said = _documented(config.__doc__ or "", [field.name for field in fields])
    for field in fields:
        hint = hints[field.name]
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        kinds = tuple(kind for kind in kinds if kind in _PLAIN or get_origin(kind) in (tuple, Literal))
        if kinds:
            default = None if field.default is dataclasses.MISSING else field.default
            found[field.name] = Field(field.name, kinds, default, field.metadata.get("help", said.get(field.name, "")))
    return found


_PLAIN = {int: "N", float: "X", str: "NAME", bool: "true|false"}


def _value(kind: Any, text: str) -> Any:
    """Raises ValueError for a text that is no such value."""
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if kind in _PLAIN:
        return kind(text)
    if get_origin(kind) is Literal:
        return get_args(kind)[[str(value) for value in get_args(kind)].index(text)]
    # Numbers as in 1,8,8 or 1x8x8; a comma at the end makes a tuple of one.
    return tuple(map(get_args(kind)[0], text.removesuffix(",").replace("x", ",").split(",")))


def _metavar(kind: Any) -> str:
    if kind in _PLAIN:
        return _PLAIN[kind]
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return ",".join("..." if part is Ellipsis else _PLAIN[part] for part in get_args(kind))


def _documented(text: str, names: list[str]) -> dict[str, str]:
    """What a docstring of the form "name: text.  other: text" says of each name."""
    start = re.compile(rf"(?:^ *|  )({'|'.join(names)}): ", re.MULTILINE)
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if start.search(part)]
    pieces = start.split("\n".join(paragraphs))[1:]
    return {name: " ".join(said.split()).rstrip(".") for name, said in zip(pieces[::2], pieces[1::2])}
