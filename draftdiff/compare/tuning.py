"""What `draftdiff tune` is asked for and what it found: a target, the points that were rendered, and the profile."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean, median, stdev
from typing import Any, ClassVar

import torch

from draftdiff.compare.comparison import Comparison
from draftdiff.compare.metrics import lpips, psnr
from draftdiff.compare.table import Column
from draftdiff.compare.video_run import Run
from draftdiff.core.allocation import Allocation
from draftdiff.errors import UserError
from draftdiff.video.config import DraftAttentionConfig
from draftdiff.video.profile import Profile


def log10(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).log10())


@dataclass(frozen=True)
class Target:
    """What the profile must reach. kind: "psnr" (dB, mean of the prompts), "lpips" (likewise) or "speedup"."""

    kind: str
    value: float
    close: ClassVar[dict[str, float]] = {"psnr": 0.025, "lpips": 0.02, "speedup": 0.01}

    @classmethod
    def of(cls, text: str) -> Target:
        """Reads "35 dB", "lpips 0.05" or "1.8x". Raises UserError for anything else."""
        number = r"(\d+(?:\.\d*)?|\.\d+)"
        forms = {"psnr": rf"{number}\s*dB", "lpips": rf"lpips\s*{number}", "speedup": rf"{number}\s*x"}
        for kind, form in forms.items():
            if (found := re.fullmatch(form, str(text).strip(), re.IGNORECASE)) and float(found[1]) > 0:
                return cls(kind, float(found[1]))
        raise UserError(f"target must be like '35 dB', 'lpips 0.05' or '1.8x', got {text!r}")

    def __str__(self) -> str:
        return {"psnr": "{:g} dB", "lpips": "lpips {:g}", "speedup": "{:g}x"}[self.kind].format(self.value)

    def of_run(self, run: Run, dense: Run) -> float:
        return (psnr if self.kind == "psnr" else lpips)(run.frames, dense.frames)

    def met(self, value: float) -> bool:
        return value <= self.value if self.kind == "lpips" else value >= self.value

    def beyond(self, value: float) -> float:
        """How far a value is beyond the target, below 0 where it is not met, as it grows evenly along the line."""
        kinds: dict[str, Callable[[float], float]] = {
            "psnr": lambda x: x / 10,
            "lpips": lambda x: -log10(max(x, 1e-6)),
            "speedup": lambda x: -1 / x,
        }
        return kinds[self.kind](value) - kinds[self.kind](self.value)


@dataclass
class Check:
    """One point of the line and what its renders showed, one value a prompt. speedup: over dense.  pairs: share of all
    token pairs that was computed."""

    allocation: Allocation
    config: DraftAttentionConfig
    psnr: list[float] = field(default_factory=list)
    lpips: list[float | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    speedup: list[float] = field(default_factory=list)
    pairs: list[float] = field(default_factory=list)

    def value(self, kind: str) -> float:
        if kind == "speedup":
            return median(self.speedup)
        return fmean(self.psnr if kind == "psnr" else [value for value in self.lpips if value is not None])


_COLUMNS: tuple[Column, ...] = (
    ("check", "check", str, "points of the search in the order of their rendering"),
    ("target", "met", str, "whether the mean of the prompts meets the target"),
    ("work", "work", "{:.3f}".format, "predicted time of the attention over that of dense attention"),
    ("pairs", "pairs", "{:.3f}".format, "share of all token pairs that is computed, dense layers included"),
    ("PSNR", "psnr", "{:.1f} dB".format, "against the dense video, mean of the prompts"),
    ("spread", "spread", "{:.1f} dB".format, "standard deviation of PSNR between prompts"),
    ("ST-LPIPS", "lpips", "{:.3f}".format, "learned perceptual distance (shift-tolerant, AlexNet); 0 is identical"),
    ("time", "seconds", "{:.2f} s".format, "median of the prompts' pipeline calls"),
    (
        "speed-up",
        "speedup",
        "{:.2f}x".format,
        "dense time over this time, median: in turns for a target of speed, else over the dense runs before",
    ),
)


@dataclass
class Tuning(Comparison[Check]):
    """A profile and how it was found. results: the rendered points, in their order.  chosen: which of them it is."""

    made_by = "draftdiff tune"
    columns = _COLUMNS

    pipeline: str
    prompts: list[str]
    seed: int
    target: Target
    profile: Profile
    results: list[Check]
    chosen: int
    weights: dict[str, list[float]]
    about: dict[str, Any] = field(default_factory=dict)

    def row(self, result: Check) -> dict[str, Any]:
        at = next(number for number, one in enumerate(self.results) if one is result)
        known = [value for value in result.lpips if value is not None]
        return {
            "check": f"{at + 1} (the profile)" if at == self.chosen else f"{at + 1}",
            "met": "met" if self.target.met(result.value(self.target.kind)) else "missed",
            "work": result.allocation.work,
            "pairs": fmean(result.pairs),
            "psnr": fmean(result.psnr),
            "spread": stdev(result.psnr) if len(result.psnr) > 1 else None,
            "lpips": fmean(known) if known else None,
            "seconds": median(result.seconds),
            "speedup": median(result.speedup),
        }

    def notes(self) -> list[str]:
        return [f"target {self.target}, on {len(self.prompts)} prompts; of others it may differ by the spread"]

    def content(self) -> dict[str, Any]:
        return {
            "pipeline": self.pipeline,
            "prompts": self.prompts,
            "seed": self.seed,
            "weights": self.weights,
            "checks": self.rows(),
            "profile": self.profile.to_dict(),
        }
