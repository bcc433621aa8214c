"""The picture of bench_kernels.py's results: time against dense, and rate per kept FLOP, over density.

python samples/bench_kernels_plot.py samples/results/cpu-kernels.json
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

_STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 10}


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the figure of a result: a column per case."""
    cases = list(result["cases"])
    measured = [row for row in result["rows"] if "seconds" in row]
    ticks = sorted({row["density"] for row in measured})
    highest = max(row.get("tflops", 0.0) for row in measured)
    names = list(dict.fromkeys(row["backend"] for row in measured))
    style = {
        name: {
            "color": PALETTE[i % len(PALETTE)],
            "linestyle": "--" if "tail" in name or i >= len(PALETTE) else "-",
            "marker": "os^Dv"[i % 5],
        }
        for i, name in enumerate(names)
    }
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(1 + 3.6 * len(cases), 6.6), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(2, len(cases), squeeze=False, sharey="row")
        for column, case in enumerate(cases):
            time, rate = grid[0][column], grid[1][column]
            for name in names:
                rows = [row for row in measured if (row["case"], row["backend"]) == (case, name)]
                if not rows:
                    continue
                x = [row["density"] for row in rows]
                ratio = [row["of_dense_time"] for row in rows]
                middle = [r["median"] for r in ratio]
                spread = [[r["median"] - r["min"] for r in ratio], [r["max"] - r["median"] for r in ratio]]
                time.errorbar(x, middle, spread, label=name, markersize=4, capsize=2, linewidth=1.3, **style[name])
                if all("tflops" in row for row in rows):
                    rate.plot(x, [row["tflops"] for row in rows], markersize=4, linewidth=1.3, **style[name])
            time.plot([0.04, 1], [0.04, 1], color="#999", linewidth=0.8, linestyle=":", label="density (no overhead)")
            time.set_title(f"{case}: {result['cases'][case]['about']}\nhead_dim {result['cases'][case]['head_dim']}")
            time.set(xscale="log", yscale="log", xticks=ticks, xticklabels=[f"{x:g}" for x in ticks])
            time.minorticks_off()
            rate.axhline(result["gemm_tflops"], color="#999", linewidth=0.8, linestyle=":")
            rate.set_xlabel("density")
            rate.set_ylim(0, 1.08 * highest)
            rate.set(xscale="log", xticks=ticks, xticklabels=[f"{x:g}" for x in ticks])
            rate.minorticks_off()
        grid[0][0].set_ylabel("time / fastest dense attention")
        grid[1][0].set_ylabel("TFLOP/s on kept FLOPs (dotted: GEMM)")
        figure.suptitle(f"{result['device']}, {result['dtype']}, medians with least and most")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
        with replacing(path) as partial:
            figure.savefig(partial, dpi=140, format="png")


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text(encoding="utf-8")), source.with_suffix(".png"))
