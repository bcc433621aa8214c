"""From settings to measured results: every setting on the same prompts and seeds, in turns, in one process.

A round runs each setting once, the dense pipeline among them, so that a machine that slows down slows all of them; a
speed-up is a ratio within a round. The dense pipeline is the stock one. Its share of attention is measured apart, in
one more run per round with clocks around its attention, and bounds what sparse attention can gain (Amdahl's law).
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from draftdiff.compare.folder import results_folder
from draftdiff.compare.html import spread, text_table
from draftdiff.compare.metrics import Quality, quality
from draftdiff.compare.page import COLUMNS, SIDE_BY_SIDE, file_name, write_page, write_videos
from draftdiff.media import frames_of
from draftdiff.video.config import DraftAttentionConfig
from draftdiff.video.patch import disable, enable, report

DENSE = "dense"
ATTENTION_PARTS = ("draft", "select", "kernel", "dense attention")
MADE_BY = "draftdiff compare"

Judge = Callable[[str, np.ndarray], dict[str, bool] | None]


@dataclass
class Timing:
    """One call of the whole pipeline, in seconds. parts: of the transformers' calls; empty where nothing is clocked."""

    seconds: float
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def attention(self) -> float:
        return sum(self.parts.get(part, 0.0) for part in ATTENTION_PARTS)

    def breakdown(self) -> dict[str, float]:
        """Seconds by what they were spent on; adds up to the whole call."""
        transformer = self.parts.get("dense forward", 0.0) + self.parts.get("sparse forward", 0.0)
        split = {part: self.parts.get(part, 0.0) for part in ATTENTION_PARTS}
        split["rest of transformer"] = max(0.0, transformer - self.attention)
        split["rest of pipeline"] = max(0.0, self.seconds - transformer)
        return split


@dataclass
class Clip:
    """What a setting made of one prompt. reports: one per transformer.  verdict: what of the prompt came out right."""

    frames: np.ndarray
    reports: list[dict[str, Any]]
    quality: Quality | None = None
    verdict: dict[str, bool] | None = None


@dataclass
class SettingResult:
    """timings: [rounds][prompts].  clocked: of the dense runs with clocks, likewise, for the dense setting only."""

    name: str
    config: DraftAttentionConfig | None
    timings: list[list[Timing]] = field(default_factory=list)
    clips: list[Clip] = field(default_factory=list)
    clocked: list[list[Timing]] = field(default_factory=list)

    def breakdown(self) -> dict[str, float]:
        """Mean seconds by what they were spent on, of the clocked runs."""
        runs = [timing.breakdown() for row in self.clocked or self.timings for timing in row]
        return {part: fmean(run.get(part, 0.0) for run in runs) for part in runs[0]}


@dataclass
class Comparison:
    """Results, the dense setting first. call: arguments of the pipeline's call.  about: where and with what it ran."""

    pipeline: str
    prompts: list[str]
    seed: int
    call: dict[str, Any]
    results: list[SettingResult]
    fps: float = 16
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def dense(self) -> SettingResult:
        return self.results[0]

    @property
    def attention_share(self) -> float:
        """Share of the dense pipeline call that is video self-attention."""
        return median(run.attention / run.seconds for row in self.dense.clocked for run in row)

    @property
    def ceiling(self) -> float:
        """Speed-up if attention took no time at all."""
        return 1 / (1 - min(self.attention_share, 0.9999))

    def row(self, result: SettingResult) -> dict[str, Any]:
        """The figures of one setting; None for what does not apply or cannot be had."""
        times = [run.seconds for row in result.timings for run in row]
        row: dict[str, Any] = {"setting": result.name, "seconds": spread(times)}
        pairs = [(run, base) for own, dense in zip(result.timings, self.dense.timings) for run, base in zip(own, dense)]
        row["speedup"] = spread([base.seconds / run.seconds for run, base in pairs]) if result.config else None
        pairs = [(run, base) for own, dense in zip(result.timings, self.dense.clocked) for run, base in zip(own, dense)]
        attention = [base.attention / run.attention for run, base in pairs if run.attention]
        row["attention_speedup"] = spread(attention) if attention else None
        predicted = None
        if row["attention_speedup"]:
            share = self.attention_share
            predicted = 1 / (1 - share + share / row["attention_speedup"]["median"])
        row["predicted_speedup"] = predicted
        for name in ("density", "missed_mass"):
            row[name] = mean_of_known(r[name] for clip in result.clips for r in clip.reports)
        for name in ("psnr", "ssim", "vmaf", "lpips", "latent_l2"):
            row[name] = mean_of_known(getattr(clip.quality, name, None) for clip in result.clips)
        verdicts = [all(clip.verdict.values()) for clip in result.clips if clip.verdict is not None]
        row["accuracy"] = fmean(verdicts) if verdicts else None
        return row

    def rows(self) -> list[dict[str, Any]]:
        return [self.row(result) for result in self.results]

    def missing(self) -> dict[str, str]:
        """Metrics that could not be had, and why."""
        found: dict[str, str] = {}
        for clip in (clip for result in self.results for clip in result.clips if clip.quality):
            assert clip.quality is not None
            found |= clip.quality.missing
        return found

    def notes(self) -> list[str]:
        """What a reader of the table should know."""
        notes = [f"no {name.replace('_', ' ')}: {reason}" for name, reason in self.missing().items()]
        notes += [
            f"{result.name} ran dense throughout: too few tokens (min_tokens), or all steps dense"
            for result in self.results[1:]
            if not any(report["sparse_steps"] for clip in result.clips for report in clip.reports)
        ]
        return notes

    def to_dict(self) -> dict[str, Any]:
        """Everything but the frames, ready for JSON."""
        settings = []
        for result, row in zip(self.results, self.rows()):
            clips = [
                {
                    "prompt": prompt,
                    "quality": asdict(clip.quality) if clip.quality else None,
                    "verdict": clip.verdict,
                    "reports": clip.reports,
                }
                for prompt, clip in zip(self.prompts, result.clips)
            ]
            settings.append(
                {
                    **row,
                    "config": asdict(result.config) if result.config else None,
                    "breakdown": result.breakdown(),
                    "timings": [[asdict(run) for run in row] for row in result.timings],
                    "clocked": [[asdict(run) for run in row] for row in result.clocked],
                    "clips": clips,
                }
            )
        return {
            "made_by": MADE_BY,
            "pipeline": self.pipeline,
            "prompts": self.prompts,
            "seed": self.seed,
            "call": {name: value for name, value in self.call.items() if _is_plain(value)},
            "fps": self.fps,
            "attention_share": self.attention_share,
            "ceiling": self.ceiling,
            "missing": self.missing(),
            "settings": settings,
            "about": self.about,
        }

    def table(self) -> str:
        """Aligned columns for a terminal; columns without a value are left out."""
        lines = text_table(self.rows(), COLUMNS)
        lines.append(
            f"attention is {self.attention_share:.0%} of the dense run: no sparse attention can be faster than "
            f"{self.ceiling:.2f}x here"
        )
        lines += self.notes()
        return "\n".join(line.rstrip() for line in lines)

    def write(self, folder: Path | str) -> Path:
        """Write results.json, the videos and report.html. Raises ValueError as `check_folder` does."""
        folder = Path(folder)
        with results_folder(folder, MADE_BY, self.to_dict()) as partial:
            write_videos(self, partial / "videos")
            write_page(self, partial / "videos", partial / "report.html")
        return folder


def mean_of_known(values: Any) -> float | None:
    """The mean of what is not None, None if nothing is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None)))


def compare(
    pipeline: Any,
    prompts: list[str],
    settings: dict[str, DraftAttentionConfig],
    *,
    repeat: int = 3,
    seed: int = 0,
    call_kwargs: dict[str, Any] | None = None,
    judge: Judge | None = None,
    progress: bool = True,
) -> Comparison:
    """Run the dense pipeline and every setting on every prompt, `repeat` times, and compare time and videos.

    pipeline: a loaded diffusers pipeline; draftdiff is disabled on it afterwards.  settings: by name.
    repeat: timed rounds, after an untimed warm-up.  seed: of the noise, the same for all prompts and settings.
    call_kwargs: further arguments of the pipeline's call.  judge: (prompt, frames) -> what of the prompt is right.
    Raises ValueError for no prompts or settings, or a setting called "dense".
    """
    if not prompts or not settings:
        raise ValueError("compare needs at least one prompt and one setting")
    if DENSE in settings:
        raise ValueError(f"a setting cannot be called {DENSE!r}: that is what the others are compared with")
    if len({file_name(0, name, 1) for name in (DENSE, SIDE_BY_SIDE, *settings)}) < len(settings) + 2:
        raise ValueError(f"settings must differ in letters or digits, for their files: {', '.join(settings)}")
    if repeat < 1:
        raise ValueError(f"repeat must be at least 1, got {repeat}")
    call = dict(call_kwargs or {})
    dense = SettingResult(DENSE, None)
    results = [dense, *(SettingResult(name, config) for name, config in settings.items())]
    clocked = DraftAttentionConfig(dense_steps=1.0)
    latents: list[Tensor | None] = []  # of the dense setting, per prompt

    def run(
        name: str, config: DraftAttentionConfig | None, prompt: str, **extra: Any
    ) -> tuple[np.ndarray, Any, Timing]:
        bar.set_postfix_str(name)
        disable(pipeline)
        if config is not None:
            enable(pipeline, config)
        return _timed_call(pipeline, prompt, seed, {**call, **extra})

    warm_up = {"num_inference_steps": 2} if "num_inference_steps" in _parameters(pipeline) else {}
    total = len(results) + repeat * len(prompts) * (1 + len(results))
    try:
        with tqdm(total=total, desc="compare", unit="run", disable=not progress) as bar:
            for result in results:
                # Kernels are compiled and memory is found on first use; the dense steps would hide the sparse ones.
                config = replace(result.config, dense_steps=0) if result.config else None
                run(f"{result.name} (warm-up)", config, prompts[0], **warm_up)
                bar.update()
            for round_number in range(repeat):
                for result in results:
                    result.timings.append([])
                dense.clocked.append([])
                for index, prompt in enumerate(prompts):
                    dense.clocked[-1].append(run("dense (clocked)", clocked, prompt)[2])
                    bar.update()
                    for result in results:
                        frames, last, timing = run(result.name, result.config, prompt)
                        result.timings[-1].append(timing)
                        if round_number == 0:
                            if result is dense:
                                latents.append(last)
                            reference = None if result is dense else dense.clips[index].frames
                            result.clips.append(
                                Clip(
                                    frames,
                                    [] if result is dense else report(pipeline).to_dict()["transformers"],
                                    None if reference is None else quality(frames, reference, last, latents[index]),
                                    judge(prompt, frames) if judge else None,
                                )
                            )
                        bar.update()
    finally:
        disable(pipeline)
    return Comparison(type(pipeline).__name__, list(prompts), seed, call, results)


def _parameters(pipeline: Any) -> Any:
    return inspect.signature(type(pipeline).__call__).parameters


def _timed_call(
    pipeline: Any, prompt: str, seed: int, call: dict[str, Any]
) -> tuple[np.ndarray, Tensor | None, Timing]:
    """Frames, final latents if the pipeline tells them, and time of one call."""
    last: list[Tensor] = []

    def keep(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        last[:] = [tensors["latents"]]
        return {}

    if "callback_on_step_end" in _parameters(pipeline):
        call = {**call, "callback_on_step_end": keep}
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    output = pipeline(prompt=prompt, generator=generator, output_type="np", **call)
    seconds = time.perf_counter() - start  # the frames are on the host: nothing is still running
    try:
        transformers = report(pipeline).transformers
    except ValueError:  # not enabled: the stock pipeline
        transformers = []
    parts: dict[str, float] = {}
    for transformer in transformers:
        for part, value in transformer.seconds.items():
            parts[part] = parts.get(part, 0.0) + value
    return frames_of(output), last[0].cpu() if last else None, Timing(seconds, parts)
