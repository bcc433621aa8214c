"""Score the mini image pair with its judge: how often does the picture show the class that was asked for?

Draws pictures of all classes by the drafter alone (plain VAR) and, with --code, by collaborative decoding after each
given number of drafted scales, from the same seeds; judges each by rule and prints the share that came out right with
its 95% confidence interval (Wilson's):

    python samples/training/score_mini_image.py --per-class 4
    python samples/training/score_mini_image.py --per-class 4 --code 1 2 3 4 5 6 --json scores.json
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from draftdiff.bench.runner import write_json
from draftdiff.cli import run
from draftdiff.cli.options import Parser, made_folder, new_file
from draftdiff.models.frames import to_uint8, write_picture
from draftdiff.pipelines.mini.image import load_mini_image, load_mini_refiner, mini_image_defaults
from draftdiff.pipelines.mini.picture_judge import accuracy
from draftdiff.pipelines.mini.pictures import CLASSES
from draftdiff.pipelines.var import VARPipeline


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share of `count` trials (Wilson 1927), at 95% by default."""
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - spread) / (1 + z * z / count), (middle + spread) / (1 + z * z / count)


def generate(
    pipe: VARPipeline, labels: list[int], batch: int, seed: int, bar: tqdm | None = None, **call: Any
) -> np.ndarray:
    """A picture per label, RGB in 0..1, [pictures, 64, 64, 3]. Each has its own seed, whatever the batch it is in."""
    pictures: list[np.ndarray] = []
    for first in range(0, len(labels), batch):
        part = labels[first : first + batch]
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
        pictures.append(pipe(part, generator=generators, output_type="np", **call).images)
        if bar is not None:
            bar.update(len(part))
    return np.concatenate(pictures)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="score_mini_image", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--per-class", type=int, default=2, help="pictures of each of the classes (default 2)")
    parser.add_argument("--code", type=int, nargs="*", default=[], help="numbers of drafted scales to score CoDe at")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's own)")
    parser.add_argument("--top-k", type=int, help="codes to draw from (default: the pipeline's own)")
    parser.add_argument("--top-p", type=float, help="probability mass to draw from (default: the pipeline's own)")
    parser.add_argument("--batch", type=int, default=20, help="pictures per pipeline call (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture (default 0)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", type=new_file(), help="also write the scores to this file")
    parser.add_argument("--save", type=made_folder, help="write a contact sheet per setting into this folder")
    arguments = parser.parse_args(argv)
    if arguments.per_class < 1 or arguments.batch < 1:
        parser.error("--per-class and --batch must be at least 1")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    pipe = load_mini_image()
    pipe.set_progress_bar_config(disable=True)
    call = dict(mini_image_defaults()["generate"])
    asked = {"guidance_scale": arguments.guidance, "top_k": arguments.top_k, "top_p": arguments.top_p}
    call |= {name: value for name, value in asked.items() if value is not None}
    labels = list(range(len(CLASSES))) * arguments.per_class

    rows: list[dict[str, Any]] = []
    for draft_scales in [None, *arguments.code]:
        name = "plain" if draft_scales is None else f"CoDe N={draft_scales}"
        if draft_scales is not None:
            try:
                pipe.enable_collaborative(load_mini_refiner(), draft_scales)
            except ValueError as error:
                parser.error(str(error))
        started = time.perf_counter()
        with tqdm(total=len(labels), desc=name, unit="picture", leave=False) as bar:
            pictures = generate(pipe, labels, arguments.batch, arguments.seed, bar, **call)
        seconds = (time.perf_counter() - started) / len(labels)
        shares = accuracy(pictures, labels)
        low, high = wilson_interval(shares["all"], len(labels))
        rows.append(
            {"setting": name, "draft_scales": draft_scales, **shares, "interval": [low, high], "seconds": seconds}
        )
        if arguments.save:
            save_sheet(pictures, arguments.save / f"{name.replace(' ', '_')}.png")

    print(f"{len(labels)} pictures of {len(CLASSES)} classes; {call}")
    columns = ("all", "shape", "colour", "place")
    print(f"{'setting':<12}{'95% interval':>18}" + "".join(f"{c:>9}" for c in columns) + f"{'ms each':>10}")
    for row in rows:
        interval = "{:.1%} - {:.1%}".format(*row["interval"])
        shown = "".join(f"{row[column]:>9.1%}" for column in columns)
        print(f"{row['setting']:<12}{interval:>18}{shown}{1000 * row['seconds']:>10.1f}")
    if arguments.json:
        report = {"pictures": len(labels), "seed": arguments.seed, "call": call, "batch": arguments.batch, "rows": rows}
        write_json(arguments.json, report)


def save_sheet(pictures: np.ndarray, file: Path, columns: int = 15) -> None:
    """All pictures, in rows, by class."""
    blank = np.zeros((-len(pictures) % columns, *pictures.shape[1:]), pictures.dtype)
    rows = np.concatenate([pictures, blank]).reshape(-1, columns, *pictures.shape[1:])
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    write_picture(file, to_uint8(sheet))


if __name__ == "__main__":
    sys.exit(run(main, "score_mini_image"))
