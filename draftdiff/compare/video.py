"""Dense and sparse runs of one pipeline on the same prompts and seeds: their figures, and what is reckoned from them.

The dense pipeline's share of attention is measured apart, in one more run per round with clocks around its attention,
and bounds what sparse attention can gain (Amdahl's law).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from itertools import chain
from statistics import fmean, median
from types import NoneType
from typing import Any

import numpy as np
from torch import Tensor

from draftdiff.compare.comparison import Comparison
from draftdiff.compare.metrics import Quality
from draftdiff.compare.table import Column, mean_of_known, spread, with_spread
from draftdiff.compare.timing import Timing, amdahl
from draftdiff.video.config import DraftAttentionConfig

DENSE = "dense"

COLUMNS: tuple[Column, ...] = (
    ("setting", "setting", str, "dense is the pipeline without draftdiff"),
    ("time", "seconds", with_spread(" s", 2), "wall time of the whole pipeline call: median (least-most)"),
    ("speed-up", "speedup", with_spread("x", 2), "dense time over this time in the same round: median (least-most)"),
    (
        "attention",
        "attention_speedup",
        lambda value: f"{value['median']:.2f}x",
        "speed-up of the video self-attentions alone, dense layers and steps included",
    ),
    ("predicted", "predicted_speedup", "{:.2f}x".format, "whole speed-up that follows from the attention's, by Amdahl"),
    ("density", "density", "{:.3f}".format, "share of token pairs computed in sparse layers, text included"),
    ("missed mass", "missed_mass", "{:.3f}".format, "share of attention on skipped tiles, by the draft's estimate"),
    ("PSNR", "psnr", "{:.1f} dB".format, "against the dense video, RGB, mean of frames; 100 is identical"),
    ("SSIM", "ssim", "{:.3f}".format, "structural similarity to the dense video, RGB; 1 is identical"),
    (
        "VMAF",
        "vmaf",
        "{:.1f}".format,
        "Netflix's perceptual score (v0.6.1, luma) at the video's own size; 97-100 is alike",
    ),
    ("ST-LPIPS", "lpips", "{:.3f}".format, "learned perceptual distance (shift-tolerant, AlexNet); 0 is identical"),
    (
        "latent L2",
        "latent_l2",
        "{:.3f}".format,
        "distance of the final latents over the dense ones' length; 0 is identical",
    ),
    (
        "prompt right",
        "accuracy",
        "{:.0%}".format,
        "share of videos that show all that the prompt says, by the rule-based judge",
    ),
)


@dataclass
class Clip:
    """What a setting made of one prompt. reports: one per transformer.  verdict: what of the prompt came out right.
    latents: the last ones, None where the pipeline does not tell them."""

    frames: np.ndarray
    reports: list[dict[str, Any]]
    quality: Quality | None = None
    verdict: dict[str, bool] | None = None
    latents: Tensor | None = None


@dataclass
class SettingResult:
    """config: None without draftdiff.  timings: [rounds][prompts].  clocked: of the dense runs with clocks, likewise,
    for the dense setting only.  cached: with the comparison's cache."""

    name: str
    config: DraftAttentionConfig | None
    timings: list[list[Timing]] = field(default_factory=list)
    clips: list[Clip] = field(default_factory=list)
    clocked: list[list[Timing]] = field(default_factory=list)
    cached: bool = False

    def breakdown(self) -> dict[str, float]:
        """Mean seconds by what they were spent on, of the clocked runs."""
        runs = [timing.breakdown() for timing in chain(*(self.clocked or self.timings))]
        return {part: fmean(run.get(part, 0.0) for run in runs) for part in runs[0]}


@dataclass
class VideoComparison(Comparison[SettingResult]):
    """Results, the dense setting first. call: arguments of the pipeline's call.  about: where and with what it ran."""

    made_by = "draftdiff compare"
    columns = COLUMNS

    pipeline: str
    prompts: list[str]
    seed: int
    call: dict[str, Any]
    results: list[SettingResult]
    fps: float = 16
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def attention_share(self) -> float:
        """Share of the dense pipeline call that is video self-attention."""
        return median(run.attention / run.seconds for run in chain(*self.baseline.clocked))

    @property
    def ceiling(self) -> float:
        """Speed-up if attention took no time at all."""
        return amdahl(min(self.attention_share, 0.9999), math.inf)

    def row(self, result: SettingResult) -> dict[str, Any]:
        runs, dense = list(chain(*result.timings)), self.baseline
        row: dict[str, Any] = {"setting": result.name, "seconds": spread([run.seconds for run in runs])}
        ratios = [base.seconds / run.seconds for run, base in zip(runs, chain(*dense.timings))]
        row["speedup"] = spread(ratios) if result is not dense else None
        pairs = zip(runs, chain(*dense.clocked))
        attention = [base.attention / run.attention for run, base in pairs if run.attention]
        row["attention_speedup"] = spread(attention) if attention else None
        row["predicted_speedup"] = amdahl(self.attention_share, spread(attention)["median"]) if attention else None
        for name in ("density", "missed_mass"):
            row[name] = mean_of_known(r[name] for clip in result.clips for r in clip.reports)
        for name in ("psnr", "ssim", "vmaf", "lpips", "latent_l2"):
            row[name] = mean_of_known(getattr(clip.quality, name, None) for clip in result.clips)
        verdicts = [all(clip.verdict.values()) for clip in result.clips if clip.verdict is not None]
        row["accuracy"] = fmean(verdicts) if verdicts else None
        return row

    @property
    def plain_call(self) -> dict[str, Any]:
        """The arguments that can be written down: an image, for one, cannot."""
        return {n: value for n, value in self.call.items() if isinstance(value, (str, int, float, bool, NoneType))}

    def missing(self) -> dict[str, str]:
        """Metrics that could not be had, and why."""
        found: dict[str, str] = {}
        for clip in (clip for result in self.results for clip in result.clips if clip.quality):
            assert clip.quality is not None
            found |= clip.quality.missing
        return found

    def notes(self) -> list[str]:
        notes = [f"no {name.replace('_', ' ')}: {reason}" for name, reason in self.missing().items()]
        notes += [
            f"{result.name} ran dense throughout: too few tokens (min_tokens), or all steps dense"
            for result in self.results[1:]
            if result.config and not any(report["sparse_steps"] for clip in result.clips for report in clip.reports)
        ]
        return notes

    def content(self) -> dict[str, Any]:
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
            "pipeline": self.pipeline,
            "prompts": self.prompts,
            "seed": self.seed,
            "call": self.plain_call,
            "fps": self.fps,
            "attention_share": self.attention_share,
            "ceiling": self.ceiling,
            "missing": self.missing(),
            "settings": settings,
        }

    def summary(self) -> list[str]:
        return [
            f"attention is {self.attention_share:.0%} of the dense run: no sparse attention can be faster than "
            f"{self.ceiling:.2f}x here"
        ]
