"""What the scripts on workloads share: options of the pair and of the files they write, and how curves are saved."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from draftdiff.bench.runner import NO_MATPLOTLIB
from draftdiff.cli.options import Parser, new_file, whole
from draftdiff.errors import UserError
from draftdiff.files import replacing


def parsed(parser: Parser, argv: list[str] | None, pair: str, draft: str) -> Any:
    """The options, with those of any such script. pair: what is taken without a model.  draft: what one must be."""
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--threads", type=whole(1), default=1, help="CPU threads (default 1)")
    parser.add_argument("--model", help=f"folder or Hub id of the target (default: {pair})")
    parser.add_argument("--draft", help=f"folder or Hub id of {draft}")
    parser.add_argument("--json", type=new_file(".json"), help="file for the figures")
    parser.add_argument("--plot", type=new_file(".png"), help="file for the curves (.png)")
    options = parser.parse_args(argv)
    if options.plot and find_spec("matplotlib") is None:
        raise UserError(NO_MATPLOTLIB)
    torch.set_num_threads(options.threads)
    return options


def save(figure: Any, file: Path) -> None:
    """Write a figure of one pair of axes, with its legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    (axes,) = figure.axes
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    count = len(axes.get_legend_handles_labels()[0])
    figure.legend(loc="outside upper center", ncols=count if count <= 4 else 3, frameon=False)
    with replacing(file) as partial:
        FigureCanvasAgg(figure).print_figure(partial, dpi=130)
