"""The 46 tools that revise drawings, as a table: what each takes, what it gives.

After the tool families of DrafterBench (arXiv 2507.11527). Nothing here draws: calls are compared, never run. Every
tool takes at most one result of another, so that what leads to a change is a chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any


@dataclass(frozen=True)
class Ref:
    """The result of an earlier call, written "$n" for that of the n-th call."""

    kind: str

    def __str__(self) -> str:
        return f"a {self.kind}"


@dataclass(frozen=True)
class Words:
    """A text that is not empty."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and bool(value.strip())

    def __str__(self) -> str:
        return "text"


@dataclass(frozen=True)
class Whole:
    """A whole number within bounds."""

    least: int
    most: int

    def accepts(self, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.least <= value <= self.most

    def __str__(self) -> str:
        return f"{self.least} to {self.most}"


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    names: tuple[str, ...]

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.names

    def __str__(self) -> str:
        return "|".join(self.names)


@dataclass(frozen=True)
class Level:
    """A level of a report: a text or a number."""

    def accepts(self, value: Any) -> bool:
        return Words().accepts(value) or Whole(1, 10**6).accepts(value)

    def __str__(self) -> str:
        return 'text or number, "missing" where it is not said'


Literal = Words | Whole | Choice | Level


@dataclass(frozen=True)
class Tool:
    """gives: the kind of its result, None for a tool that changes or reports something."""

    name: str
    parameters: dict[str, Ref | Literal]
    gives: str | None
    about: str

    @property
    def takes(self) -> str | None:
        """The parameter that takes an earlier result."""
        return next((name for name, kind in self.parameters.items() if isinstance(kind, Ref)), None)

    @property
    def literals(self) -> dict[str, Literal]:
        return {name: kind for name, kind in self.parameters.items() if not isinstance(kind, Ref)}


FILE, MARKS, MARK, ITEMS, TEXT, TABLE = map(Ref, ("file", "marks", "mark", "items", "text", "table"))
CORNERS = ("top left", "top right", "bottom left", "bottom right", "centre")
COLORS = ("black", "red", "green", "blue", "grey")
CORNER, COLOR = Choice(CORNERS), Choice(COLORS)
FONT = Choice(("arial", "courier", "times", "verdana"))
SIZE, SHIFT, ANGLE, PERCENT, LENGTH = Whole(4, 96), Whole(-999, 999), Whole(-359, 359), Whole(10, 990), Whole(1, 999)

REACHES, ITEM_KINDS = ("covered", "crossed"), ("drawings", "lines", "rebars", "columns")
SELECTORS = {f"{kind} {reach}": f"select_{reach}_{kind}" for reach, kind in product(REACHES, ITEM_KINDS)}


def _projectors(what: Ref) -> list[Tool]:
    name = what.kind
    return [
        Tool(f"move_{name}", {name: what, "right": SHIFT, "down": SHIFT}, None, f"Move {name}; left and up are < 0."),
        Tool(f"rotate_{name}", {name: what, "degrees": ANGLE}, None, f"Turn {name} clockwise about its centre."),
        Tool(f"scale_{name}", {name: what, "percent": PERCENT}, None, f"Scale {name} about its centre."),
    ]


def _styles(what: Ref) -> list[Tool]:
    name = what.kind
    return [
        Tool(f"set_{name}_size", {name: what, "size": SIZE}, None, f"Set the letter size of {name}, in points."),
        Tool(f"set_{name}_color", {name: what, "color": COLOR}, None, f"Set the colour of {name}."),
        Tool(f"set_{name}_font", {name: what, "font": FONT}, None, f"Set the font of {name}."),
    ]


_ALL = [
    Tool("open_file", {"path": Words()}, "file", "Open a drawing file."),
    Tool("save_file", {"file": FILE}, None, "Save a file; once for each opened file, after all its changes."),
    Tool("read_marks", {"file": FILE, "page": Whole(1, 99)}, "marks", "Read the marked rectangles of a page."),
    Tool("pick_mark", {"marks": MARKS, "order": Whole(1, 99)}, "mark", "Take one of the marked rectangles."),
    Tool(
        "report_missing",
        {level: Level() for level in ("file", "page", "order", "base")},
        None,
        'Report a place that is not fully named: all four levels, "missing" for what is not said.',
    ),
    *(
        Tool(tool, {"mark": MARK}, "items", f"Take the {words} by a marked rectangle.")
        for words, tool in SELECTORS.items()
    ),
    Tool(
        "add_text",
        {"mark": MARK, "corner": CORNER, "content": Words(), "size": SIZE, "color": COLOR},
        None,
        "Write a text at a corner of a marked rectangle.",
    ),
    Tool("find_text", {"mark": MARK, "content": Words()}, "text", "Find a text in a marked rectangle."),
    Tool("replace_text", {"text": TEXT, "content": Words()}, None, "Write something else instead of a text."),
    Tool("delete_text", {"text": TEXT}, None, "Delete a text."),
    *_projectors(TEXT),
    *_styles(TEXT),
    Tool("set_text_align", {"text": TEXT, "align": Choice(("left", "middle", "right"))}, None, "Align a text."),
    Tool(
        "add_table",
        {"mark": MARK, "corner": CORNER, "title": Words(), "rows": Whole(1, 99), "columns": Whole(1, 99)},
        None,
        "Draw an empty table at a corner of a marked rectangle.",
    ),
    Tool("extract_table", {"mark": MARK, "title": Words()}, "table", "Find a table in a marked rectangle."),
    Tool(
        "set_cell",
        {"table": TABLE, "row": Words(), "column": Words(), "value": Whole(0, 9999)},
        None,
        "Set a value of a table.",
    ),
    Tool("add_row", {"table": TABLE, "row": Words()}, None, "Add a row at the end of a table."),
    Tool("delete_row", {"table": TABLE, "row": Words()}, None, "Delete a row of a table."),
    *_projectors(TABLE),
    *_styles(TABLE),
    Tool(
        "add_line",
        {"mark": MARK, "corner": CORNER, "length": LENGTH, "degrees": ANGLE},
        None,
        "Draw a line from a corner of a marked rectangle.",
    ),
    Tool(
        "add_rectangle",
        {"mark": MARK, "corner": CORNER, "width": LENGTH, "height": LENGTH},
        None,
        "Draw a rectangle at a corner of a marked rectangle.",
    ),
    Tool(
        "add_circle",
        {"mark": MARK, "corner": CORNER, "radius": LENGTH},
        None,
        "Draw a circle about a corner of a marked rectangle.",
    ),
    Tool("delete_items", {"items": ITEMS}, None, "Delete what was selected."),
    Tool("repair_items", {"items": ITEMS}, None, "Close the gaps in what was selected."),
    *_projectors(ITEMS),
    Tool("set_line_width", {"items": ITEMS, "width": LENGTH}, None, "Set the line width, in tenths of a millimetre."),
    Tool("set_line_color", {"items": ITEMS, "color": COLOR}, None, "Set the line colour."),
    Tool(
        "set_line_style", {"items": ITEMS, "style": Choice(("solid", "dashed", "dotted"))}, None, "Set the line style."
    ),
]
TOOLS: dict[str, Tool] = {tool.name: tool for tool in _ALL}
