"""A table of figures: its columns, how their values are written, and its lines for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

# Title, key of the row, how to write the value, what it means.
Column = tuple[str, str, Callable[[Any], str], str]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def mean_of_known(values: Iterable[Any]) -> float | None:
    """The mean of what is not None, None if nothing is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def megabytes(value: float) -> str:
    """Bytes as people read them."""
    return f"{value / 1e6:.3g} MB" if value < 1e9 else f"{value / 1e9:.2f} GB"


def with_spread(unit: str, digits: int) -> Callable[[dict[str, float]], str]:
    """Writes a median with its least and most."""

    def show(value: dict[str, float]) -> str:
        middle, low, high = (f"{value[name]:.{digits}f}" for name in ("median", "min", "max"))
        # One run has no spread.
        return f"{middle}{unit}" if value["min"] == value["max"] else f"{middle}{unit} ({low}-{high})"

    return show


def shown_columns(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> list[tuple[str, str, list[str]]]:
    """(title, meaning, cells) of the columns that have a value in some row."""
    shown = []
    for title, key, write, meaning in columns:
        values = [row[key] for row in rows]
        if any(value is not None for value in values):
            shown.append((title, meaning, ["" if value is None else write(value) for value in values]))
    return shown


def text_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> list[str]:
    """Lines of aligned columns for a terminal; columns without a value are left out."""
    aligned: list[list[str]] = []
    for title, _, cells in shown_columns(rows, columns):
        width = max(map(len, (title, *cells)))
        aligned.append([cell.rjust(width) if aligned else cell.ljust(width) for cell in (title, *cells)])
    lines = ["  ".join(cells) for cells in zip(*aligned)]
    lines.insert(1, "-" * len(lines[0]))
    return lines
