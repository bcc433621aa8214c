"""A comparison of image settings for the eye: a contact sheet, and one self-contained page."""

from __future__ import annotations

import base64
import io
import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from draftdiff.compare.charts import bars, scatter
from draftdiff.compare.clips import contact_sheet, side_by_side
from draftdiff.compare.html import document, figure
from draftdiff.compare.image import ImageComparison
from draftdiff.models.frames import write_picture

SHEET_ROWS, PAGE_ROWS = 8, 4  # pictures per setting that are shown
LARGEST = 512  # pixels a side of a picture in the page


def write(comparison: ImageComparison, folder: Path | str) -> Path:
    """Write results.json, contact-sheet.png and report.html. Raises UserError as `check_folder` does."""
    return comparison.write(folder, fill)


def fill(comparison: ImageComparison, folder: Path) -> None:
    """Add contact-sheet.png and report.html to a folder."""
    write_sheet(comparison, folder / "contact-sheet.png")
    (folder / "report.html").write_text(page(comparison), encoding="utf-8")


def write_sheet(comparison: ImageComparison, path: Path) -> None:
    """One PNG: a column per setting under its name, a row per picture."""
    rows = _some(len(comparison.subjects), SHEET_ROWS)
    together = side_by_side({result.setting.name: result.pictures[rows] for result in comparison.results})
    write_picture(path, contact_sheet(together, moments=len(rows)))


def _some(count: int, most: int) -> list[int]:
    """At most so many of `count` indices, evenly spread, so that all subjects have a chance to be seen."""
    return [i * count // min(count, most) for i in range(min(count, most))]


def page(comparison: ImageComparison) -> str:
    rows = comparison.rows()
    fastest = max(rows[1:], key=lambda row: row["speedup"]["median"])
    smallest = min(rows[1:], key=lambda row: row["cache"])
    pictures = len(comparison.subjects)
    headline = (
        f"{pictures} picture{'s' * (pictures > 1)} in one batch. Fastest: <b>{fastest['setting']}</b>, "
        f"{fastest['speedup']['median']:.2f}x. Smallest cache: <b>{smallest['setting']}</b>, "
        f"{smallest['cache_share']:.0%} of the plain one."
    )
    sections = [
        "<h2>Pictures</h2>",
        '<p class="note">One seed per row. CoDe and a cut cache lead to other draws: a picture that differs from the '
        "plain one is not worse for that; judge each by what it shall show.</p>",
        *(_pictures(comparison, index) for index in _some(pictures, PAGE_ROWS)),
        "<h2>Likeness against speed</h2>",
        _scatters(rows),
        "<h2>Time and cache</h2>",
        _bars(rows),
    ]
    return document(comparison, f"CoDe and ScaleKV: {comparison.model}", headline, sections, _facts(comparison))


def _pictures(comparison: ImageComparison, index: int) -> str:
    figures = []
    for result in comparison.results:
        facts = []
        if result is not comparison.baseline:
            same = np.array_equal(result.pictures[index], comparison.baseline.pictures[index])
            facts.append("the plain picture" if same else "another sample")
        if result.right is not None:
            facts.append("class right" if result.right[index] else "class wrong")
        figures.append(figure(_picture(result.pictures[index], result.setting.name), result.setting.name, facts))
    subject = escape(str(comparison.subjects[index]))
    return f'<h3>“{subject}”, seed {comparison.seed + index}</h3><div class="pictures">{"".join(figures)}</div>'


def _picture(picture: np.ndarray, name: str) -> str:
    from PIL import Image

    image, buffer = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((LARGEST, LARGEST))
    image.save(buffer, "PNG")
    data, (width, height) = base64.b64encode(buffer.getvalue()).decode(), image.size
    return f'<img src="data:image/png;base64,{data}" style="aspect-ratio:{width}/{height}" alt="{escape(name)}">'


def _scatters(rows: list[dict[str, Any]]) -> str:
    charts = []
    for key, title, best in (("psnr", "PSNR (dB)", math.inf), ("accuracy", "class right (share)", 1.0)):
        points = [(row["setting"], row["speedup"], row[key]) for row in rows[1:] if row[key] is not None]
        if points:
            charts.append(scatter(points, title, base="plain", best=best))
    return f'<div class="charts">{"".join(charts)}</div>'


def _bars(rows: list[dict[str, Any]]) -> str:
    time = [(row["setting"], {"seconds per picture": row["seconds_per_image"]["median"]}) for row in rows]
    cache = [(row["setting"], {"MB of keys and values": row["cache"] / 1e6}) for row in rows]
    return bars(time, title="time per picture") + bars(cache, "MB", "cache")


def _facts(comparison: ImageComparison) -> dict[str, Any]:
    facts: dict[str, Any] = {"model": comparison.model, **comparison.about, "seed": comparison.seed, **comparison.call}
    facts["pictures"] = ", ".join(map(str, comparison.subjects))
    return facts
