"""The picture of bench_var.py's results. Draws one anew from a results file:

python samples/bench_var_plot.py samples/results/cpu-var.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from draftdiff.compare.charts import PALETTE
from draftdiff.files import replacing

COLUMNS = 4
_STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 10}


def draw_speed(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Bars of the measured speed-up with its spread, and what the operations predict."""
    for x, row in enumerate(rows):
        if row["speedup"] is None:
            if row["skipped"]:
                reason = axes.text(x, 0.05, row["skipped"], rotation=90, ha="center", va="bottom", fontsize=7)
                reason.set_in_layout(False)
            continue
        speed = row["speedup"]
        axes.bar(x, speed["median"], 0.7, color=_colour(row))
        axes.vlines(x, speed["min"], speed["max"], color="#222", lw=1)
        axes.hlines(row["predicted_speedup"], x - 0.42, x + 0.42, color="#222", lw=1.6, ls=(0, (2, 1)))
        axes.text(x, max(speed["max"], row["predicted_speedup"]) + 0.05, f"{speed['median']:.2f}", ha="center", size=7)
    axes.axhline(1, color="#8c8c8c", lw=0.8)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.08)
    axes.set_ylabel("speed-up")
    axes.set_xticks([])


def draw_cache(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Bars of the cache and of the memory above the weights, as shares of the plain run."""
    plain = rows[0]
    for x, row in enumerate(rows):
        for key, shift, colour in (("cache", -0.2, PALETTE[5]), ("memory", 0.2, "#c9ced6")):
            if row[key] is not None and plain[key]:
                axes.bar(x + shift, row[key] / plain[key], 0.38, color=colour)
    axes.set_ylabel("of plain")
    axes.set_xticks(range(len(rows)), [row["setting"] for row in rows], rotation=90, fontsize=7)


def _colour(row: dict[str, Any]) -> str:
    both = row["draft_scales"] is not None and row["budget"] is not None
    return PALETTE[2] if both else PALETTE[0] if row["draft_scales"] is not None else PALETTE[1]


def plot(payload: dict[str, Any], path: Path) -> None:
    """Write the picture: a pair of charts per model and batch size."""
    results = [result for result in payload["results"] if result["rows"]]
    if not results:
        return
    with matplotlib.rc_context(_STYLE):
        columns = min(len(results), COLUMNS)
        bands = -(-len(results) // columns)
        figure = Figure(figsize=(max(4.3 * columns, 8), 5.2 * bands + 0.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2 * bands, columns, squeeze=False)
        for each in axes.flat:
            each.set_visible(False)  # until it is drawn on
        for number, result in enumerate(results):
            band, column = divmod(number, columns)
            above, below = axes[2 * band : 2 * band + 2, column]
            above.set_visible(True)
            below.set_visible(True)
            above.set_title(f"{result['model']} ({result['size']}), batch {result['batch']}")
            draw_speed(above, result["rows"])
            draw_cache(below, result["rows"])
            for each in (above, below):
                each.set_xlim(-0.6, len(result["rows"]) - 0.4)
        figure.suptitle(
            f"CoDe and ScaleKV on {payload['device']}\n"
            "above: speed-up, measured (CoDe blue, ScaleKV orange, both green) and predicted by operations (dashes)\n"
            "below: cache (blue) and memory above the weights (grey)",
            fontsize=10,
        )
        with replacing(path) as partial:
            figure.savefig(partial, dpi=110, format="png")


if __name__ == "__main__":
    source = Path(sys.argv[1])
    plot(json.loads(source.read_text(encoding="utf-8")), source.with_suffix(".png"))
