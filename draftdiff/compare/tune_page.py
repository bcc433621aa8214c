"""A profile for the eye: where it computes, what it was learnt from, and the renders it was checked on, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from draftdiff.compare.charts import bars, density_legend, heat_map
from draftdiff.compare.html import document
from draftdiff.compare.tuning import Tuning
from draftdiff.files import replacing


def write(tuning: Tuning, path: Path) -> None:
    """Write the page, whole or not at all. Raises NotWritten."""
    with replacing(path) as partial:
        partial.write_text(page(tuning), encoding="utf-8")


def page(tuning: Tuning) -> str:
    best = tuning.results[tuning.chosen]
    density = best.allocation.density
    maps = [
        heat_map("mean of the heads", density.mean(2).tolist(), down="stretch of steps"),
        heat_map("mean of the steps", density.mean(0).T.tolist(), down="head"),
        *(
            heat_map(f"steps, stretch {number + 1} of {len(density)}", rows.T.tolist(), down="head")
            for number, rows in enumerate(density)
        ),
    ]
    weights = [
        bars([(f"{kind[:-1]} {number}", {"weight": value}) for number, value in enumerate(values)], unit="", title=kind)
        for kind, values in (
            ("steps", _over_mean(tuning.weights["steps"])),
            ("layers", _over_mean(tuning.weights["layers"])),
        )
    ]
    row = tuning.row(best)
    headline = (
        f"<b>{tuning.target}</b> is met with <b>{row['work']:.2f}</b> of dense attention's work: "
        f"{row['psnr']:.1f} dB, {row['speedup']:.2f}x as fast as dense."
    )
    sections = [
        "<h2>Density by layer, head and steps</h2>",
        density_legend(),
        f'<div class="charts">{"".join(maps)}</div>',
        "<h2>What an error counts</h2>",
        '<p class="note">Learnt from renders in which one stretch of steps, or one band of layers, is sparse alone; '
        "over their mean.</p>",
        f'<div class="charts">{"".join(weights)}</div>',
    ]
    model = tuning.about.get("model") or tuning.pipeline
    return document(tuning, f"Profile: {model}, {tuning.target}", headline, sections, _facts(tuning))


def _over_mean(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    return [value / mean if mean else 1.0 for value in values]


def _facts(tuning: Tuning) -> dict[str, Any]:
    profile = tuning.profile
    facts: dict[str, Any] = {"pipeline": tuning.pipeline, **tuning.about, "seed": tuning.seed}
    facts |= {"made for": profile.config.made_for, "grid": profile.grid, "steps": profile.steps}
    facts |= {f"prompt {number}": prompt for number, prompt in enumerate(tuning.prompts, start=1)}
    return facts | {"single tokens": f"{profile.config.tokens:.3f} of all keys"}
