"""The picture of bench_dit.py's results. Draws one anew from a results file:

python samples/bench_dit_plot.py samples/results/cpu-dit.json
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
from matplotlib.patches import Patch

from draftdiff.compare.charts import PALETTE
from draftdiff.files import replacing

# What a step's time goes to, from the bottom of its bar, in colours that colour-blind readers tell apart.
PARTS = {
    "rest of the transformer": "#c9ced6",
    "dense attention": PALETTE[0],
    "sparse kernel": PALETTE[5],
    "draft": PALETTE[4],
    "select": PALETTE[1],
    "hook": PALETTE[3],
}
MODES = {
    "eager": PALETTE[0],
    "compiled": PALETTE[5],
    "eager, first block cache": PALETTE[1],
    "compiled, first block cache": PALETTE[4],
}
_STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 10}


def split(row: dict[str, Any]) -> dict[str, float]:
    """Seconds of an eager step by part; adds up to the step."""
    total = row["seconds_per_step"]["median"]
    clocked = row.get("parts_seconds", {"dense attention": row.get("attention_seconds", 0.0)})
    seconds = {part: clocked.get(name, 0.0) for part, name in zip(PARTS, ("", "dense attention", "kernel", "draft"))}
    seconds |= {"select": clocked.get("select", 0.0), "hook": row.get("hook_seconds", 0.0)}
    seconds["rest of the transformer"] = max(0.0, total - sum(seconds.values()))
    return seconds


def short_name(row: dict[str, Any]) -> str:
    return "dense" if row["sparsity"] is None else f"{row['sparsity']:g}"


def draw_step(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Stacked bars of one step per setting, with the speed-up and what Amdahl's law says of it."""
    highest = max(row["seconds_per_step"]["median"] for row in rows)
    for x, row in enumerate(rows):
        bottom = 0.0
        for part, seconds in split(row).items():
            axes.bar(x, seconds, 0.68, bottom=bottom, color=PARTS[part], label=part if x == 0 else None)
            bottom += seconds
        if "speedup" in row:
            axes.text(x, bottom + 0.08 * highest, f"{row['speedup']['median']:.2f}x", ha="center", weight="bold")
            law = f"Amdahl {row['predicted_speedup']:.2f}x" if "predicted_speedup" in row else ""
            axes.text(x, bottom + 0.02 * highest, law, ha="center", fontsize=6.8)
        else:
            share = row.get("attention_share")
            text = "" if share is None else f"attention\n{share:.0%}"
            axes.text(x, bottom + 0.02 * highest, text, ha="center", fontsize=7.5)
    axes.set_xticks(range(len(rows)), [short_name(row) for row in rows])
    axes.set_ylim(0, 1.2 * highest)


def draw_runs(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Speed-up of a whole run over the eager dense one, a group per setting and a bar per mode."""
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    settings = list(dict.fromkeys(short_name(row) for row in rows))
    width = 0.8 / len(modes)
    for i, mode in enumerate(modes):
        for row in rows:
            if row["mode"] == mode:
                x = settings.index(short_name(row)) + (i - (len(modes) - 1) / 2) * width
                value = row["run"].get("speedup_over_eager_dense", 0.0)
                axes.bar(x, value, 0.92 * width, color=MODES[mode])
                axes.text(x, value, f"{value:.2f}", ha="center", va="bottom", fontsize=7)
    highest = max(row["run"].get("speedup_over_eager_dense", 1.0) for row in rows)
    axes.set_ylim(0, (1.12 + 0.07 * len(modes)) * highest)
    axes.axhline(1, color="#555555", linewidth=0.8)
    axes.set_xticks(range(len(settings)), settings)
    axes.set_xlabel("sparsity")


def _legend(axes: Any, colours: dict[str, str], where: str) -> None:
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    axes.legend(handles=handles, loc=where, frameon=False, fontsize=7, handlelength=1.2, labelspacing=0.3)


def plot(payload: dict[str, Any], path: Path) -> None:
    """Write the picture of a result of bench_dit.py; models that could not be run are left out."""
    shown = []
    for model in payload["models"]:
        rows = [row for row in model["rows"] if "skipped" not in row and row["setting"] != "dense, hooked"]
        if any(row["mode"] == "eager" for row in rows):
            shown.append((model, rows))
    if not shown:
        return
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(7.0, 3.1 * len(shown) + 0.6), 7.4), layout="constrained")
        grid = figure.subplots(2, len(shown), squeeze=False)
        for column, (model, rows) in enumerate(shown):
            depth = f"{model['layers']} layers"
            if model["layers"] < model["full_layers"]:
                depth += f" of {model['full_layers']}"
            small = "" if model["size"] == "full" else "small version of\n"
            lines = f"{small}{model['title']}\n{model['tokens']:,} video tokens, {depth}"
            grid[0, column].set_title(lines)
            draw_step(grid[0, column], [row for row in rows if row["mode"] == "eager"])
            draw_runs(grid[1, column], rows)
        grid[0, 0].set_ylabel("seconds per denoising step, eager")
        steps = payload["run_steps"]
        grid[1, 0].set_ylabel(f"speed-up of a {steps}-step run over eager dense\n(first fifth of the steps dense)")
        used = [mode for mode in MODES if any(row["mode"] == mode for _, rows in shown for row in rows)]
        # Bars shrink to the right in the upper row and grow to the right in the lower: room for the legends.
        _legend(grid[0, 0], dict(reversed(PARTS.items())), "upper right")
        _legend(
            grid[1, 0],
            {mode.replace("cache", "cache (hits every second step)"): MODES[mode] for mode in used},
            "upper left",
        )
        figure.suptitle(f"{payload['device']}: timed on {payload['measured_on']}", fontsize=10, weight="bold")
        with replacing(path) as partial:
            FigureCanvasAgg(figure).print_figure(partial, dpi=130, format="png")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit("usage: python samples/bench_dit_plot.py RESULTS.json")
    plot(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[1]).with_suffix(".png"))
