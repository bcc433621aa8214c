"""What rules and schedules do to the picture: videos against the dense ones of the same seeds, over many prompts.

All settings of a prompt run in turn in one process, so that their times may be compared. The embedded model's prompts
are combinations that it never saw in training, and its rule-based judge says whether a video shows what was asked for;
with another model the prompts are the user's, and there is no judge.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from tqdm import tqdm

from draftdiff.bench.runner import Routine, check_names
from draftdiff.compare.table import Column, mean_of_known, spread, text_table, with_spread
from draftdiff.compare.video import DENSE, Clip
from draftdiff.compare.video_run import first_look, run_setting
from draftdiff.errors import UserError, user_errors
from draftdiff.models.video import Judge, Model, call_arguments, load, world_judge
from draftdiff.video.config import DraftAttentionConfig
from draftdiff.video.patch import disable

COLUMNS: tuple[Column, ...] = (
    ("setting", "setting", str, ""),
    ("speed-up", "speedup", with_spread("x", 2), ""),
    ("density", "density", "{:.3f}".format, ""),
    ("pairs", "pairs", "{:.3f}".format, ""),
    ("PSNR, mean", "psnr_mean", "{:.1f} dB".format, ""),
    ("median (least-most)", "psnr", with_spread("", 1), ""),
    ("SSIM", "ssim", "{:.3f}".format, ""),
    ("VMAF", "vmaf", "{:.1f}".format, ""),
    ("ST-LPIPS", "lpips", "{:.3f}".format, ""),
    ("prompt right", "right", "{:.0%}".format, ""),
)


@dataclass(frozen=True)
class Schedule:
    """Which steps are dense, and weights over the others. Their density follows from the work of the whole run."""

    dense_steps: int
    dense_end: int = 0
    weights: tuple[float, ...] = ()

    def config(self, work: float, steps: int, fields: Mapping[str, Any]) -> DraftAttentionConfig | None:
        """A config under which a run has so much work, in dense steps; None if the schedule cannot have it."""
        ends: dict[str, Any] = {"dense_steps": self.dense_steps, "dense_end": self.dense_end}
        sparse = len(DraftAttentionConfig(**ends).sparse_steps(steps))
        density = (work - self.dense_steps - self.dense_end) / max(1, sparse)
        # Weights are taken over equal stretches of the sparse steps.
        over = [self.weights[i * len(self.weights) // sparse] for i in range(sparse)] if self.weights else [1.0]
        density /= fmean(over)
        if not 0 < density <= 1 or density * max(over) > 1 + 1e-9:
            return None
        sparsity: Any = tuple(max(0.0, 1 - density * weight) for weight in self.weights) or 1 - density
        return DraftAttentionConfig(**{**fields, **ends, "sparsity": sparsity})


RULES: dict[str, dict[str, Any]] = {
    "mass": {"selection": "draft", "tokens": 0.0},
    "mass, no tail": {"selection": "draft", "tokens": 0.0, "tail": False},
    "mass, tokens 1/4": {"selection": "draft", "tokens": 0.25},
    "error": {"selection": "error", "tokens": 0.0},
    "error, tokens 1/8": {"selection": "error", "tokens": 0.125},
    "error, tokens 1/4": {"selection": "error", "tokens": 0.25},
    "error, tokens 1/2": {"selection": "error", "tokens": 0.5},
    "upstream": {"selection": "upstream", "tail": False},
}
SCHEDULES: dict[str, Schedule] = {
    "2 dense": Schedule(2),
    "1 dense": Schedule(1),
    "0 dense": Schedule(0),
    "1 dense, then less": Schedule(1, weights=(2, 1, 1)),
    "first steps denser": Schedule(0, weights=(2, 1, 1)),
    "falling": Schedule(0, weights=(8, 4, 3, 2.5, 2.5)),
    "last steps denser": Schedule(0, weights=(1, 1, 2)),
    "1 dense, 1 at the end": Schedule(1, 1),
    "0 dense, 1 at the end": Schedule(0, 1),
}


class Quality(Routine):
    name = "quality"
    file = "{device}-quality"
    picture = "quality"

    def __init__(self, options: Namespace) -> None:
        super().__init__(options)
        if options.model is not None and not options.prompt:
            raise UserError("--model needs --prompt: the held-out prompts are those of the embedded model")
        self.model: Model = load(options.model, device=options.device, dtype=options.dtype)
        self.model.pipeline.set_progress_bar_config(disable=True)
        self.call = call_arguments(self.model, steps=options.steps)
        with user_errors():
            self.settings = self.named_settings()

    @property
    def common(self) -> dict[str, Any]:
        """What all settings have: the embedded model is there to show the method, also where it does not pay."""
        return {"min_tokens": 0} if self.options.model is None else {}

    def named_settings(self) -> dict[str, DraftAttentionConfig]:
        """Each rule at each sparsity."""
        names = self.options.rules or list(RULES)
        check_names("--rules", names, RULES)
        return {
            f"{name}, sparsity {sparsity:g}": DraftAttentionConfig(sparsity, **self.common, **RULES[name])
            for sparsity in self.options.sparsity
            for name in names
        }

    @property
    def steps(self) -> int:
        """Denoising steps of a call."""
        given = self.call.get("num_inference_steps")
        return int(self.model.parameters["num_inference_steps"].default if given is None else given)

    @cached_property
    def prompts(self) -> list[str]:
        if self.options.prompt:
            return list(self.options.prompt)
        return held_out(self.options.prompts)

    @cached_property
    def judge(self) -> Judge | None:
        return world_judge(self.prompts)[0] if self.options.model is None else None

    def cases(self) -> list[tuple[int, str]]:
        return list(enumerate(self.prompts, start=self.options.seed))

    def about(self) -> dict[str, Any]:
        settings = {name: asdict(config) for name, config in self.settings.items()}
        return {"model": self.model.name, "steps": self.steps, "settings": settings}

    def measure(self, case: tuple[int, str]) -> list[dict[str, Any]]:
        """A row per setting. density: of sparse calls.  pairs: of all calls.  seconds, dense_seconds: of each round.
        right, dense_right: whether the judge finds what was asked for in the setting's video and in the dense one, None
        without a judge."""
        seed, prompt = case
        pipeline, settings = self.model.pipeline, {DENSE: None, **self.settings}
        clips: dict[str, Clip] = {}
        seconds: dict[str, list[float]] = {name: [] for name in settings}
        try:
            for _ in range(self.options.rounds):
                for name, config in tqdm(settings.items(), desc=prompt, unit="video", leave=False):
                    done = run_setting(pipeline, config, prompt, seed, self.call)
                    seconds[name].append(done.timing.seconds)
                    if name not in clips:
                        verdict = self.judge(prompt, done.frames) if self.judge else None
                        clips[name] = first_look(done, clips.get(DENSE), verdict)
        finally:
            disable(pipeline)
        dense = {"dense_seconds": seconds[DENSE], "dense_right": _right(clips[DENSE])}
        return [
            self.row(clips[name], seconds[name]) | {"setting": name, "prompt": prompt, "seed": seed} | dense
            for name in self.settings
        ]

    def row(self, clip: Clip, seconds: list[float]) -> dict[str, Any]:
        assert clip.quality is not None
        return {
            "seconds": seconds,
            "density": mean_of_known(report["density"] for report in clip.reports),
            "pairs": mean_of_known(
                kept for report in clip.reports for step in report["density_by_step_and_layer"] for kept in step
            ),
            "right": _right(clip),
            **{name: getattr(clip.quality, name) for name in ("psnr", "ssim", "vmaf", "lpips")},
        }

    def conclude(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        return {"summary": summary(results), "dense_right": mean_of_known(row["dense_right"] for row in results)}

    def table(self, payload: Mapping[str, Any]) -> Iterable[str]:
        return text_table(payload["summary"], COLUMNS)


class Schedules(Quality):
    """Schedules of the same work, under the default rule."""

    name = "schedules"
    file = "{device}-schedules"

    def named_settings(self) -> dict[str, DraftAttentionConfig]:
        names = self.options.schedules or list(SCHEDULES)
        check_names("--schedules", names, SCHEDULES)
        found: dict[str, DraftAttentionConfig | None] = {}
        for sparsity in self.options.sparsity:
            at = f"sparsity {sparsity:g}"
            found[f"default, {at}"] = plain = DraftAttentionConfig(sparsity, **self.common)
            work = self.steps - sparsity * len(plain.sparse_steps(self.steps))
            for name in names:
                found[f"{name}, {at}"] = SCHEDULES[name].config(work, self.steps, self.common)
        return {name: config for name, config in found.items() if config is not None}


def held_out(count: int) -> list[str]:
    """Prompts of the embedded model's world, of combinations that it was not trained on."""
    from draftdiff.pipelines.mini import world

    return [world.plain_caption(scene) for scene in world.even_scenes(count, held_out=True)]


def _right(clip: Clip) -> bool | None:
    return None if clip.verdict is None else all(clip.verdict.values())


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per setting, over all prompts."""
    found = []
    for name in dict.fromkeys(row["setting"] for row in results):
        rows = [row for row in results if row["setting"] == name]
        ratios = [d / s for row in rows for d, s in zip(row["dense_seconds"], row["seconds"])]
        psnr = [row["psnr"] for row in rows]
        one = {"setting": name, "speedup": spread(ratios), "psnr_mean": fmean(psnr), "psnr": spread(psnr)}
        for key in ("density", "pairs", "ssim", "vmaf", "lpips", "right"):
            one[key] = mean_of_known(row[key] for row in rows)
        found.append(one)
    return found
