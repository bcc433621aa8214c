"""The one plotter of `draftdiff bench`: a picture per routine, from the results that it wrote. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from draftdiff.compare.charts import PALETTE
from draftdiff.compare.timing import breakdown
from draftdiff.files import replacing

GREY = "#c9ced6"
_STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 10}


@contextmanager
def drawing(path: Path, width: float, height: float, dpi: int = 130) -> Iterator[Figure]:
    """A figure of so many inches, written whole or not at all as a PNG at the end."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with replacing(path) as partial:
            FigureCanvasAgg(figure).print_figure(partial, dpi=dpi, format="png")


def lines(axes: Any, series: Mapping[str, Sequence[tuple[float, float]]], *, title: str, label: str) -> None:
    """Lines through points (x, y), by name."""
    for colour, (name, points) in zip(PALETTE, series.items()):
        axes.plot(*zip(*points), "o-", color=colour, label=name, ms=4)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)


def log_ticks(axes: Any, ticks: Sequence[float]) -> None:
    axes.set(xscale="log", xticks=ticks, xticklabels=[f"{x:g}" for x in ticks])
    axes.minorticks_off()


# ---------------------------------------------------------------- kernels


def kernels(payload: Mapping[str, Any], path: Path) -> None:
    """Time against dense, and rate per kept FLOP, over density: a column per case."""
    measured = sorted((row for row in payload["rows"] if row.get("seconds")), key=lambda row: row["density"])
    ticks = sorted({row["density"] for row in measured})
    names = dict.fromkeys(row["backend"] for row in measured)
    style = {
        name: {
            "color": PALETTE[i % len(PALETTE)],
            "linestyle": "--" if "tail" in name or i >= len(PALETTE) else "-",
            "marker": "os^Dv"[i % 5],
            "markersize": 4,
            "linewidth": 1.3,
        }
        for i, name in enumerate(names)
    }
    with drawing(path, max(8, 1 + 3.6 * len(payload["cases"])), 6.6, dpi=140) as figure:
        grid = figure.subplots(2, len(payload["cases"]), squeeze=False, sharey="row")
        for (case, shape), time, rate in zip(payload["cases"].items(), *grid):
            for name in names:
                rows = [row for row in measured if (row["case"], row["backend"]) == (case, name)]
                if rows:
                    _kernel_lines(time, rate, rows, name, style[name])
            time.plot([0.04, 1], [0.04, 1], color="#999", linewidth=0.8, linestyle=":", label="density (no overhead)")
            time.set_title(f"{case}: {shape['about']}\nhead_dim {shape['head_dim']}")
            time.set(yscale="log")
            rate.axhline(payload["gemm_tflops"], color="#999", linewidth=0.8, linestyle=":")
            rate.set_xlabel("density")
            rate.set_ylim(0, 1.08 * max(row.get("tflops") or 0.0 for row in measured))
            log_ticks(time, ticks)
            log_ticks(rate, ticks)
        grid[0][0].set_ylabel("time / fastest dense attention")
        grid[1][0].set_ylabel("TFLOP/s on kept FLOPs (dotted: GEMM)")
        figure.suptitle(f"{payload['device']}, {payload['dtype']}, medians with least and most")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)


def _kernel_lines(time: Any, rate: Any, rows: list[dict[str, Any]], name: str, style: dict[str, Any]) -> None:
    x, ratio = [row["density"] for row in rows], [row["of_dense_time"] for row in rows]
    spread = [[r["median"] - r["min"] for r in ratio], [r["max"] - r["median"] for r in ratio]]
    time.errorbar(x, [r["median"] for r in ratio], spread, label=name, capsize=2, **style)
    if all(row.get("tflops") for row in rows):
        rate.plot(x, [row["tflops"] for row in rows], **style)


# ---------------------------------------------------------------- dit

# What a step's time goes to, from the bottom of its bar.
PARTS = {
    "rest of transformer": GREY,
    "dense attention": PALETTE[0],
    "kernel": PALETTE[5],
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


def dit(payload: Mapping[str, Any], path: Path) -> None:
    """Where a step's time goes, and what a run gains: a column per model; those that could not be run are left out."""
    shown = []
    for model in payload["models"]:
        rows = [row for row in model["rows"] if not row.get("skipped") and row["setting"] != "dense, hooked"]
        if any(row["mode"] == "eager" for row in rows):
            shown.append((model, rows))
    if not shown:
        return
    used = [mode for mode in MODES if any(row["mode"] == mode for _, rows in shown for row in rows)]
    with drawing(path, max(7.0, 3.1 * len(shown) + 0.6), 7.4) as figure:
        grid = figure.subplots(2, len(shown), squeeze=False)
        for (model, rows), step, run in zip(shown, *grid):
            depth = f"{model['layers']} layers"
            if model["layers"] < model["full_layers"]:
                depth += f" of {model['full_layers']}"
            small = "" if model["size"] == "full" else "small version of\n"
            step.set_title(f"{small}{model['title']}\n{model['tokens']:,} video tokens, {depth}")
            _dit_step(step, [row for row in rows if row["mode"] == "eager"])
            _dit_runs(run, rows)
        grid[0, 0].set_ylabel("seconds per denoising step, eager")
        steps = payload["run_steps"]
        grid[1, 0].set_ylabel(f"speed-up of a {steps}-step run over eager dense\n(first fifth of the steps dense)")
        # Bars shrink to the right in the upper row and grow to the right in the lower: room for the legends.
        _legend(grid[0, 0], dict(reversed(PARTS.items())), "upper right")
        hits = {mode.replace("cache", "cache (hits every second step)"): MODES[mode] for mode in used}
        _legend(grid[1, 0], hits, "upper left")
        figure.suptitle(f"{payload['device']}: timed on {payload['measured_on']}", fontsize=10, weight="bold")


def split(row: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of an eager step by part; adds up to the step."""
    total, hook = row["seconds_per_step"]["median"], row.get("hook_seconds") or 0.0
    clocked = row.get("parts_seconds") or {"dense attention": row.get("attention_seconds") or 0.0}
    parts = breakdown(total, {**clocked, "dense forward": total - hook})
    return parts | {"hook": parts.pop("rest of pipeline")}


def _short(row: Mapping[str, Any]) -> str:
    return "dense" if row["sparsity"] is None else f"{row['sparsity']:g}"


def _dit_step(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Stacked bars of one step per setting, with the speed-up and what Amdahl's law says of it."""
    highest = max(row["seconds_per_step"]["median"] for row in rows)
    for x, row in enumerate(rows):
        bottom, parts = 0.0, split(row)
        for part, colour in PARTS.items():
            axes.bar(x, parts[part], 0.68, bottom=bottom, color=colour)
            bottom += parts[part]
        below = ""
        if row.get("speedup"):
            axes.text(x, bottom + 0.08 * highest, f"{row['speedup']['median']:.2f}x", ha="center", weight="bold")
            below = f"Amdahl {row['predicted_speedup']:.2f}x" if row.get("predicted_speedup") else ""
        elif row.get("attention_share") is not None:
            below = f"attention\n{row['attention_share']:.0%}"
        axes.text(x, bottom + 0.02 * highest, below, ha="center", fontsize=7)
    axes.set_xticks(range(len(rows)), [_short(row) for row in rows])
    axes.set_ylim(0, 1.2 * highest)


def _dit_runs(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Speed-up of a whole run over the eager dense one, a group per setting and a bar per mode."""
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    settings = list(dict.fromkeys(map(_short, rows)))
    width = 0.8 / len(modes)
    for row in rows:
        x = settings.index(_short(row)) + (modes.index(row["mode"]) - (len(modes) - 1) / 2) * width
        value = row["run"].get("speedup_over_eager_dense", 0.0)
        axes.bar(x, value, 0.92 * width, color=MODES[row["mode"]])
        axes.text(x, value, f"{value:.2f}", ha="center", va="bottom", fontsize=7)
    highest = max(row["run"].get("speedup_over_eager_dense", 1.0) for row in rows)
    axes.set_ylim(0, (1.12 + 0.07 * len(modes)) * highest)
    axes.axhline(1, color="#555555", linewidth=0.8)
    axes.set_xticks(range(len(settings)), settings)
    axes.set_xlabel("sparsity")


def _legend(axes: Any, colours: Mapping[str, str], where: str) -> None:
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    axes.legend(handles=handles, loc=where, frameon=False, fontsize=7, handlelength=1.2, labelspacing=0.3)


# ---------------------------------------------------------------- var


def var(payload: Mapping[str, Any], path: Path, columns: int = 4) -> None:
    """Speed-up above cache and memory: a pair of charts per model and batch size."""
    results = [result for result in payload["results"] if result["rows"]]
    if not results:
        return
    columns = min(len(results), columns)
    bands = -(-len(results) // columns)
    with drawing(path, max(4.3 * columns, 8), 5.2 * bands + 0.6, dpi=110) as figure:
        axes = figure.subplots(2 * bands, columns, squeeze=False)
        for each in axes.flat[:]:
            each.set_visible(False)  # until it is drawn on
        for number, result in enumerate(results):
            band, column = divmod(number, columns)
            above, below = axes[2 * band : 2 * band + 2, column]
            above.set_title(f"{result['model']} ({result['size']}), batch {result['batch']}")
            _var_speed(above, result["rows"])
            _var_cache(below, result["rows"])
            for each in (above, below):
                each.set_visible(True)
                each.set_xlim(-0.6, len(result["rows"]) - 0.4)
        figure.suptitle(
            f"CoDe and ScaleKV on {payload['device']}\n"
            "above: speed-up, measured (CoDe blue, ScaleKV orange, both green) and predicted by operations (dashes)\n"
            "below: cache (blue) and memory above the weights (grey)",
            fontsize=10,
        )


def _var_speed(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Bars of the measured speed-up with its spread, and what the operations predict."""
    for x, row in enumerate(rows):
        if row["skipped"]:
            reason = axes.text(x, 0.05, row["skipped"][:48], rotation=90, ha="center", va="bottom", fontsize=7)
            reason.set_in_layout(False)
        if row["speedup"] is None:
            continue
        speed = row["speedup"]
        both = row["draft_scales"] is not None and row["budget"] is not None
        colour = PALETTE[2] if both else PALETTE[0] if row["draft_scales"] is not None else PALETTE[1]
        axes.bar(x, speed["median"], 0.7, color=colour)
        axes.vlines(x, speed["min"], speed["max"], color="#222", lw=1)
        axes.hlines(row["predicted_speedup"], x - 0.42, x + 0.42, color="#222", lw=1.6, ls=(0, (2, 1)))
        axes.text(x, max(speed["max"], row["predicted_speedup"]) + 0.05, f"{speed['median']:.2f}", ha="center", size=7)
    axes.axhline(1, color="#8c8c8c", lw=0.8)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.08)
    axes.set_ylabel("speed-up")
    axes.set_xticks([])


def _var_cache(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Bars of the cache and of the memory above the weights, as shares of the plain run."""
    plain = rows[0]
    for x, row in enumerate(rows):
        for key, shift, colour in (("cache", -0.2, PALETTE[5]), ("memory", 0.2, GREY)):
            if row[key] is not None and plain[key]:
                axes.bar(x + shift, row[key] / plain[key], 0.38, color=colour)
    axes.set_ylabel("of plain")
    axes.set_xticks(range(len(rows)), [row["setting"] for row in rows], rotation=90, fontsize=7)


# ---------------------------------------------------------------- quality


def quality(payload: Mapping[str, Any], path: Path) -> None:
    """PSNR of every prompt by setting, its mean, and the speed-up."""
    settings = payload["summary"]
    with drawing(path, 8, 1.2 + 0.34 * len(settings)) as figure:
        axes = figure.subplots()
        for y, one in enumerate(settings):
            values = [row["psnr"] for row in payload["rows"] if row["setting"] == one["setting"]]
            axes.plot(values, [y] * len(values), "o", color=PALETTE[0], ms=3.5, alpha=0.45, mew=0)
            axes.vlines(one["psnr_mean"], y - 0.32, y + 0.32, color=PALETTE[1], lw=2.2)
            told = f"{one['psnr_mean']:.1f} dB, {one['speedup']['median']:.2f}x"
            axes.text(1.01, y, told, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        axes.set_yticks(range(len(settings)), [one["setting"] for one in settings], fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set_xlabel("PSNR against the dense video, dB: each prompt, and the mean")
        count = len({(row["prompt"], row["seed"]) for row in payload["rows"]})
        figure.suptitle(
            f"{payload['model']}, {payload['steps']} steps, {count} prompts, {payload['device']}", fontsize=10
        )


# ---------------------------------------------------------------- llm


def speculation(payload: Mapping[str, Any], path: Path) -> None:
    """Prediction and measurement over the target's cost, a panel each."""
    rows = payload["rows"]
    methods = dict.fromkeys(row["method"] for row in rows)
    predicted = {m: [(row["layers"], row["mbsu"]) for row in rows if row["method"] == m] for m in methods}
    measured = {m: [(row["layers"], row["speedup"]["median"]) for row in rows if row["method"] == m] for m in methods}
    with drawing(path, 9, 3.8) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        label = "layers of the target (draft: 1)"
        lines(left, predicted, title="predicted by bytes read (MBSU)", label=label)
        lines(right, measured, title="measured, prompt included", label=label)
        for axes in (left, right):
            axes.axhline(1, color="gray", lw=0.8)
            log_ticks(axes, sorted({row["layers"] for row in rows}))
        left.set_ylabel("speed-up over plain decoding")
        right.legend(frameon=False, fontsize=8)
