"""Instructions in words: a task as somebody would write it, as a form or in sentences."""

from __future__ import annotations

import random
from typing import Any

from draftdiff.llm.workloads.drawing.tasks import KINDS, LEVELS, Change, Place, Task

# By tool. Values stand in braces.
PHRASES: dict[str, tuple[str, ...]] = {
    "add_text": (
        'write "{content}" in {color}, {size} points high',
        'put the text "{content}" there, {size} points, {color}',
    ),
    "add_table": (
        'draw a table called "{title}" with {rows} rows and {columns} columns',
        'add an empty table "{title}" of {rows} rows by {columns} columns',
    ),
    "add_line": ("draw a line of length {length} at {degrees} degrees", "add a {length} long line, {degrees} degrees"),
    "add_rectangle": ("draw a rectangle {width} wide and {height} high", "add a box of width {width}, height {height}"),
    "add_circle": ("draw a circle of radius {radius}", "add a circle with a radius of {radius}"),
    "replace_text": ('let it read "{content}"', 'replace it with "{content}"'),
    "delete_text": ("delete it", "take it out"),
    "set_cell": ("set {column} of row {row} to {value}", "in row {row} the {column} must be {value}"),
    "add_row": ("add a row {row}", "append row {row}"),
    "delete_row": ("delete row {row}", "take out row {row}"),
    "delete_items": ("delete them", "remove them"),
    "repair_items": ("close their gaps", "repair them"),
    "set_line_width": ("make the lines {width} wide", "set the line width to {width}"),
    "set_line_color": ("make the lines {color}", "set the line colour to {color}"),
    "set_line_style": ("make the lines {style}", "set the line style to {style}"),
    "set_text_align": ("align it {align}", "set the alignment to {align}"),
    **{
        f"move_{name}": (
            "move {it} {right} to the right and {down} down",
            "shift {it} right by {right}, down by {down}",
        )
        for name in ("text", "table", "items")
    },
    **{f"rotate_{name}": ("turn {it} by {degrees} degrees", "rotate {it} {degrees} degrees")
       for name in ("text", "table", "items")},
    **{f"scale_{name}": ("scale {it} to {percent} percent", "resize {it} to {percent} %")
       for name in ("text", "table", "items")},
    **{f"set_{name}_size": ("make the letters {size} points high", "set the letter size to {size}")
       for name in ("text", "table")},
    **{f"set_{name}_color": ("colour it {color}", "make it {color}") for name in ("text", "table")},
    **{f"set_{name}_font": ("set it in {font}", "change the font to {font}") for name in ("text", "table")},
}  # fmt: skip
# What stands in a sentence for a value that is left open.
VAGUE: dict[str, str] = {
    "size": "some", "color": "any colour", "font": "a plain font", "align": "as fits", "right": "a little",
    "down": "a little", "degrees": "some", "percent": "a few more", "length": "some", "width": "somewhat",
    "height": "somewhat", "radius": "fitting", "rows": "some", "columns": "some", "style": "as usual",
}  # fmt: skip
BASES: dict[str, tuple[str, ...]] = {
    "corner": ("at its {base}", "starting from the {base}"),
    "text": ('for the text "{base}"', 'where it says "{base}"'),
    "table": ('for the table "{base}"', 'in the table "{base}"'),
    "items": ("for the {base} by it", "with all {base}"),
}
PLACES: dict[str, tuple[str, ...]] = {
    "file": ("in {file}", "open {file}"),
    "page": ("on page {page}", "go to page {page}"),
    "order": ("at mark {order}", "take mark {order}"),
}
FORM = {"file": "file", "page": "page", "order": "mark", "base": "base"}


def instruction(task: Task, chance: random.Random) -> str:
    """A task in words."""
    write = _form if task.controllers["structured"] else _sentence
    return "\n".join(write(task.kind, place, chance) for place in task.places)


def _form(kind: str, place: Place, chance: random.Random) -> str:
    levels = [f"{FORM[level]}: {getattr(place, level)}" for level in LEVELS if level != place.missing]
    return "; ".join([*levels, *(f"change: {_form_of(change)}" for change in place.changes)])


def _form_of(change: Change) -> str:
    values = [f"{key} {'open' if key in change.vague else _quoted(value)}" for key, value in change.values.items()]
    return ", ".join([change.tool.replace("_", " "), *values])


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) and " " in value else str(value)


def _sentence(kind: str, place: Place, chance: random.Random) -> str:
    where = [chance.choice(PLACES[level]) for level in LEVELS[:3] if level != place.missing]
    if chance.random() < 0.5:
        where.reverse()
    base = KINDS[kind].base
    if place.missing != "base":
        where.append(chance.choice(BASES[base]))
    what = " and ".join(_phrase(change, "them" if base == "items" else "it", chance) for change in place.changes)
    levels = {level: getattr(place, level) for level in LEVELS}
    said = f"{', '.join(where).format(**levels)}: {what}."
    return said[0].upper() + said[1:]


def _phrase(change: Change, it: str, chance: random.Random) -> str:
    values = {key: VAGUE[key] if key in change.vague else value for key, value in change.values.items()}
    return chance.choice(PHRASES[change.tool]).format(it=it, **values)
