"""Seeded tasks of drawing revision: twelve types under five binary controllers, and their truth.

The sixth controller of DrafterBench (arXiv 2507.11527) is the type. A place has four levels, file, page, marked
rectangle and base (what in the rectangle is meant); an incomplete instruction leaves one of them out for some place,
which is then to be reported and not guessed, while the others are worked on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from draftdiff.llm.workloads.drawing.calls import Chain, chains, parse, written
from draftdiff.llm.workloads.drawing.scoring import VAGUE
from draftdiff.llm.workloads.drawing.tools import CORNERS, SELECTORS, TOOLS, Choice

LEVELS = ("file", "page", "order", "base")
STYLES, PROJECTORS = ("size", "color", "font"), ("move", "rotate", "scale")


@dataclass(frozen=True)
class Kind:
    """A type of task. base: what the base of its places is.  changes: the tools that it is about."""

    base: str
    changes: tuple[str, ...]


KINDS: dict[str, Kind] = {
    "add_text": Kind("corner", ("add_text",)),
    "add_table": Kind("corner", ("add_table",)),
    "add_vector": Kind("corner", ("add_line", "add_rectangle", "add_circle")),
    "revise_text": Kind("text", ("replace_text", "delete_text")),
    "revise_table": Kind("table", ("set_cell", "add_row", "delete_row")),
    "delete_vector": Kind("items", ("delete_items", "repair_items")),
    "map_text": Kind("text", tuple(f"{one}_text" for one in PROJECTORS)),
    "map_table": Kind("table", tuple(f"{one}_table" for one in PROJECTORS)),
    "map_vector": Kind("items", tuple(f"{one}_items" for one in PROJECTORS)),
    "refresh_text": Kind("text", (*(f"set_text_{one}" for one in STYLES), "set_text_align")),
    "refresh_table": Kind("table", tuple(f"set_table_{one}" for one in STYLES)),
    "refresh_vector": Kind("items", ("set_line_width", "set_line_color", "set_line_style")),
}
# What one may leave to whoever answers, and what gold answers then choose.
OPEN: dict[str, Any] = {
    "size": 12, "color": "black", "font": "arial", "align": "left", "right": 20, "down": 20, "degrees": 45,
    "percent": 120, "length": 50, "width": 5, "height": 50, "radius": 50, "rows": 4, "columns": 3, "style": "solid",
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """tool: a change's.  values: its literals but for the corner.  vague: those that the instruction leaves open."""

    tool: str
    values: dict[str, Any]
    vague: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Place:
    """Where something is to change. missing: the level that the instruction leaves out, None of a complete one."""

    file: str
    page: int
    order: int
    base: str
    changes: tuple[Change, ...]
    missing: str | None = None

    def said(self, level: str) -> Any:
        return "missing" if level == self.missing else getattr(self, level)


@dataclass(frozen=True)
class Task:
    """controllers: by name, whether structured, vague, incomplete, of several objects, of several operations."""

    kind: str
    controllers: dict[str, bool]
    places: tuple[Place, ...]
    truth: list[Chain] = field(default_factory=list, repr=False)
    answer: str = field(default="", repr=False)


CONTROLLERS = ("structured", "vague", "incomplete", "several_objects", "several_operations")


def task(kind: str, chance: random.Random, files: Sequence[str] = ()) -> Task:
    """A task of a type. files: names of drawings that it may be about; none: any."""
    on = {name: chance.random() < 0.5 for name in CONTROLLERS}
    count = 2 if on["several_objects"] else 1
    lost = chance.randrange(count) if on["incomplete"] else None

    def draw() -> str:
        return chance.choice(files) if files else file_name(chance)

    path = draw()
    places: list[Place] = []
    marks: set[tuple[str, int, int]] = set()
    for number in range(count):
        path = path if chance.random() < 0.5 else draw()
        where = (path, chance.randint(1, 30), chance.randint(1, 9))
        while where in marks:
            where = (path, chance.randint(1, 30), chance.randint(1, 9))
        marks.add(where)
        missing = chance.choice(LEVELS) if number == lost else None
        places.append(Place(*where, _base(kind, chance), _changes(kind, on, chance), missing))
    made = Task(kind, on, tuple(places))
    answer = written(_gold(made))
    return Task(kind, on, made.places, _truth(made, answer), answer)


def file_name(chance: random.Random) -> str:
    """The name of a drawing."""
    return f"{chance.choice(BUILDINGS)}_{chance.randint(10, 99)}.pdf"


BUILDINGS = ("bridge", "tunnel", "pier", "hall", "tower", "dam", "quay", "garage", "silo", "depot", "school", "mast")
PARTS = ("beam", "slab", "wall", "column", "footing", "stair", "truss", "girder", "anchor", "joint", "panel", "ramp")
STATES = ("checked", "revised", "as built", "to be poured", "on hold", "see detail", "void", "replaced")
HEADS = ("length", "width", "weight", "count", "level", "strength")


def _base(kind: str, chance: random.Random) -> str:
    return {
        "corner": lambda: chance.choice(CORNERS),
        "text": lambda: _label(chance),
        "table": lambda: f"{chance.choice(PARTS)} list",
        "items": lambda: chance.choice(list(SELECTORS)),
    }[KINDS[kind].base]()


def _label(chance: random.Random) -> str:
    return f"{chance.choice(PARTS)} {chance.choice('ABCDEFGH')}{chance.randint(1, 99)}"


def _changes(kind: str, on: dict[str, bool], chance: random.Random) -> tuple[Change, ...]:
    names = KINDS[kind].changes
    count = 2 if on["several_operations"] else 1
    chosen = chance.sample(names, count) if len(names) >= count else [names[0]] * count
    return tuple(_change(name, on["vague"], chance) for name in chosen)


def _change(name: str, vague: bool, chance: random.Random) -> Change:
    literals = {key: kind for key, kind in TOOLS[name].literals.items() if key != "corner"}
    values = {key: _value(key, kind, chance) for key, kind in literals.items()}
    left_open = frozenset(key for key in literals if vague and key in OPEN)
    return Change(name, values | {key: OPEN[key] for key in left_open}, left_open)


def _value(key: str, kind: Any, chance: random.Random) -> Any:
    if isinstance(kind, Choice):
        return chance.choice(kind.names)
    if key == "content":
        return f"{_label(chance)} {chance.choice(STATES)}"
    if key == "title":
        return f"{chance.choice(PARTS)} list"
    if key == "row":
        return f"{chance.choice('ABCDEFGH')}{chance.randint(1, 99)}"
    if key == "column":
        return chance.choice(HEADS)
    if key in ("rows", "columns"):
        return chance.randint(2, 9)
    return chance.randint(max(kind.least, 5), min(kind.most, 400))


def _gold(made: Task) -> list[dict[str, Any]]:
    """The calls of an answer with full marks."""
    calls: list[dict[str, Any]] = []
    opened: dict[str, str] = {}

    def call(tool: str, **arguments: Any) -> str:
        calls.append({"tool": tool, **arguments})
        return f"${len(calls)}"

    for place in made.places:
        if place.missing is not None:
            call("report_missing", **{level: place.said(level) for level in LEVELS})
            continue
        if place.file not in opened:
            opened[place.file] = call("open_file", path=place.file)
        marks = call("read_marks", file=opened[place.file], page=place.page)
        mark = call("pick_mark", marks=marks, order=place.order)
        base, given = KINDS[made.kind].base, {"mark": mark}
        if base == "text":
            given = {"text": call("find_text", mark=mark, content=place.base)}
        elif base == "table":
            given = {"table": call("extract_table", mark=mark, title=place.base)}
        elif base == "items":
            given = {"items": call(SELECTORS[place.base], mark=mark)}
        else:
            given["corner"] = place.base
        for change in place.changes:
            call(change.tool, **given, **change.values)
    for handle in opened.values():
        call("save_file", file=handle)
    return calls


def _truth(made: Task, answer: str) -> list[Chain]:
    """The chains of the gold answer, in which the open values are VAGUE."""
    found, _ = chains(parse(answer))
    changes = iter([change for place in made.places if place.missing is None for change in place.changes])
    truth = []
    for chain in found:
        last = chain[-1]
        if last.tool.name not in ("report_missing", "save_file"):
            vague = dict.fromkeys(next(changes).vague, VAGUE)
            chain = (*chain[:-1], type(last)(last.tool, {**last.literals, **vague}, last.source))
        truth.append(chain)
    return truth
