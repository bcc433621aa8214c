"""Score the mini video pipeline with its judge: how often does the clip show what the prompt asked for?

Generates clips for prompts whose (colour, shape, motion) combination never occurred in training, judges each by rule,
and prints the share that came out right, per attribute and all together. With --sparsity it does the same again with
draftdiff enabled at each given sparsity, from the same starting noise, and prints dense and sparse side by side:

    python samples/training/score_mini_video.py --prompts 48
    python samples/training/score_mini_video.py --prompts 48 --sparsity 0.5 0.75 0.9 --json scores.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from tqdm import tqdm

from draftdiff.bench.runner import write_json
from draftdiff.cli import run
from draftdiff.cli.options import Parser, made_folder, new_file
from draftdiff.models.devices import find_device
from draftdiff.models.frames import to_uint8, write_picture
from draftdiff.pipelines.mini import judge as mini_judge
from draftdiff.pipelines.mini import world as mini_world
from draftdiff.pipelines.mini.video import load_mini_video, mini_video_defaults


def generate(
    pipe: WanPipeline, scenes: Sequence[mini_world.Scene], batch: int, seed: int, bar: tqdm | None = None, **call: Any
) -> list[np.ndarray]:
    """One clip per scene. Each has its own seed, so its starting noise does not depend on the batch it is in."""
    clips: list[np.ndarray] = []
    for first in range(0, len(scenes), batch):
        part = scenes[first : first + batch]
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
        prompts = [mini_world.plain_caption(scene) for scene in part]
        clips += list(pipe(prompts, generator=generators, output_type="np", **call).frames)
        if bar is not None:
            bar.update(len(part))
    return clips


def accuracy(clips: Sequence[np.ndarray], scenes: Sequence[mini_world.Scene]) -> dict[str, float]:
    """The share of clips that are right, for each attribute, for the size, and for all four attributes at once."""
    judgements = [mini_judge.judge(clip) for clip in clips]
    checks = [mini_judge.compare(judgement, scene) for judgement, scene in zip(judgements, scenes, strict=True)]
    result = {"all": float(np.mean([all(check.values()) for check in checks]))}
    result |= {name: float(np.mean([check[name] for check in checks])) for name in mini_judge.ATTRIBUTES}
    pairs = zip(judgements, scenes, strict=True)
    result["size"] = float(np.mean([judgement.size == scene.size for judgement, scene in pairs]))
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="score_mini_video", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--prompts", type=int, default=48, help="how many prompts (default 48)")
    parser.add_argument(
        "--seen", action="store_true", help="use combinations seen in training instead of held-out ones"
    )
    parser.add_argument(
        "--sparsity", type=float, nargs="*", default=[], help="draftdiff sparsities to compare with dense"
    )
    parser.add_argument("--steps", type=int, help="denoising steps (default: the pipeline's own)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's own)")
    parser.add_argument("--frames", type=int, help="frames per clip (default: the pipeline's own)")
    parser.add_argument("--height", type=int, help="height in pixels (default: the pipeline's own)")
    parser.add_argument("--width", type=int, help="width in pixels (default: the pipeline's own)")
    parser.add_argument("--batch", type=int, default=4, help="prompts per pipeline call (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first clip (default 0)")
    parser.add_argument("--device", default="cpu", help="where to generate: in fp32 on a CPU (default), else in bf16")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", type=new_file(), help="also write the scores to this file")
    parser.add_argument("--save", type=made_folder, help="write a contact sheet of each setting here")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    device = find_device(arguments.device)
    pipe = load_mini_video(dtype=torch.float32 if device.type == "cpu" else torch.bfloat16).to(device)
    pipe.set_progress_bar_config(disable=True)
    call = dict(mini_video_defaults()["generate"])
    asked = {
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance,
        "num_frames": arguments.frames,
        "height": arguments.height,
        "width": arguments.width,
    }
    call |= {name: value for name, value in asked.items() if value is not None}
    scenes = mini_world.even_scenes(arguments.prompts, held_out=not arguments.seen)

    rows: list[dict[str, Any]] = []
    for sparsity in [None, *arguments.sparsity]:
        name = "dense" if sparsity is None else f"sparsity {sparsity:g}"
        if sparsity is not None:
            import draftdiff

            draftdiff.enable(pipe, draftdiff.DraftAttentionConfig(sparsity=sparsity))
        started = time.perf_counter()
        with tqdm(total=len(scenes), desc=name, unit="clip", leave=False) as bar:
            clips = generate(pipe, scenes, arguments.batch, arguments.seed, bar, **call)
        seconds = (time.perf_counter() - started) / len(scenes)
        if sparsity is not None:
            draftdiff.disable(pipe)
        rows.append({"setting": name, "sparsity": sparsity, **accuracy(clips, scenes), "seconds_per_clip": seconds})
        if arguments.save:
            save_sheet(clips, arguments.save / f"{name.replace(' ', '_')}.png")

    kind = "seen" if arguments.seen else "held-out"
    print(f"{len(scenes)} prompts of {kind} combinations; {call}")
    columns = ["all", *mini_judge.ATTRIBUTES, "size"]
    print(f"{'setting':<16}" + "".join(f"{column:>12}" for column in columns) + f"{'s per clip':>12}")
    for row in rows:
        shares = "".join(f"{row[column]:>12.1%}" for column in columns)
        print(f"{row['setting']:<16}{shares}{row['seconds_per_clip']:>12.1f}")
    if arguments.json:
        report = {"prompts": len(scenes), "combinations": kind, "seed": arguments.seed, "call": call, "rows": rows}
        write_json(arguments.json, report)


def save_sheet(clips: Sequence[np.ndarray], file: Path) -> None:
    """One row of six frames per clip."""
    rows = [np.concatenate(list(clip[np.linspace(0, len(clip) - 1, 6).astype(int)]), axis=1) for clip in clips]
    write_picture(file, to_uint8(np.concatenate(rows)))


if __name__ == "__main__":
    sys.exit(run(main, "score_mini_video"))
