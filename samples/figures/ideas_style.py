"""How the pictures of docs/ideas look, and where they go."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap

from draftdiff.files import replacing

IDEAS = Path(__file__).resolve().parents[2] / "docs" / "ideas"
INK, SOFT, LINE, PALE = "#1f2933", "#606975", "#dfe3e8", "#cfe3f5"
BLUE, ORANGE, GREEN, PINK, AMBER, SKY, GRAY = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c",
)  # fmt: skip
BLUES = LinearSegmentedColormap.from_list("blues", ["#f7fbff", "#9ecae1", "#4292c6", "#08519c", "#081c48"])
mpl.rcParams.update(
    {
        "font.size": 10,
        "font.family": "sans-serif",
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": LINE,
        "axes.labelcolor": INK,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": "#eceff2",
        "text.color": INK,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "lines.linewidth": 2.0,
        "lines.markersize": 5,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "figure.dpi": 150,
        "savefig.facecolor": "white",
    }
)


def panels(*widths: float, height: float = 3.0, width: float = 9.2) -> tuple[Any, list[Any]]:
    """A figure with panels of these relative widths."""
    figure, axes = plt.subplots(
        1, len(widths), figsize=(width, height), width_ratios=widths, squeeze=False, layout="constrained"
    )
    return figure, list(axes[0])


def picture(axis: Any, values: np.ndarray, title: str, cmap: Any = BLUES, **kwargs: Any) -> Any:
    """A matrix or picture without ticks."""
    axis.grid(False)
    axis.set(xticks=[], yticks=[], title=title)
    axis.spines[:].set_visible(True)
    return axis.imshow(values, cmap=cmap, interpolation="nearest", **kwargs)


def bare(axis: Any, title: str = "") -> None:
    """For drawings: no axes."""
    axis.set_axis_off()
    axis.set_title(title)


def save(name: str, figure: Any) -> Path:
    """A small PNG: a drawing of few colours needs no more than a palette."""
    path, drawn = IDEAS / f"{name}.png", io.BytesIO()
    figure.savefig(drawn)
    plt.close(figure)
    with replacing(path) as partial, Image.open(drawn) as image:
        image.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(partial, "PNG", optimize=True)
    return path
