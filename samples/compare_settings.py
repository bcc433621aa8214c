"""Dense against sparse attention in thirty lines: what `draftdiff compare` does, by the Python API.

    python samples/compare_settings.py --prompt "a large red circle moves right on a black background"

It runs the embedded mini model once dense and once per sparsity, from the same noise, and prints time, density and
likeness to the dense video. For figures to rely on use `draftdiff compare`: it warms up, repeats and takes turns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import draftdiff
from draftdiff.cli import run
from draftdiff.cli.options import Parser, made_folder
from draftdiff.compare.metrics import psnr, ssim
from draftdiff.models.frames import frames_of, write_frames
from draftdiff.pipelines.mini.video import load_mini_video, mini_video_defaults


def clip_of(pipe: Any, prompt: str, seed: int, **call: Any) -> tuple[np.ndarray, float]:
    """The clip, uint8 [frames, height, width, 3], and the seconds it took."""
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    output = pipe(prompt=prompt, generator=generator, output_type="np", **call)
    return frames_of(output), time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="compare_settings", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--prompt", default="a large red circle moves right on a black background")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=made_folder, help="write the clips into this folder")
    options = parser.parse_args(argv)

    pipe = load_mini_video()
    defaults = mini_video_defaults()
    call = defaults["generate"] | ({"num_inference_steps": options.steps} if options.steps else {})

    dense, dense_seconds = clip_of(pipe, options.prompt, options.seed, **call)
    clips = {"dense": dense}
    print(f"{'dense':<14} {dense_seconds:6.1f} s")

    for sparsity in options.sparsity:
        draftdiff.enable(pipe, draftdiff.DraftAttentionConfig(sparsity=sparsity))
        clip, seconds = clip_of(pipe, options.prompt, options.seed, **call)
        report = draftdiff.report(pipe).transformers[0]
        draftdiff.disable(pipe)

        name = f"sparsity {sparsity:g}"
        clips[name] = clip
        density = report.mean_density
        print(
            f"{name:<14} {seconds:6.1f} s  {dense_seconds / seconds:5.2f}x  "
            f"density {'none' if density is None else f'{density:.3f}'}  "
            f"PSNR {psnr(clip, dense):5.1f} dB  SSIM {ssim(clip, dense):.3f}"
        )

    if options.save:
        for name, clip in clips.items():
            write_frames(options.save / f"{name.replace(' ', '-')}.mp4", clip, defaults["fps"])


if __name__ == "__main__":
    sys.exit(run(main, "compare_settings"))
