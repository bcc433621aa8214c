"""Next-scale image models with CoDe, ScaleKV and both, measured against the plain model on the same seeds.

All settings run in turn within a round, in one process, so that a machine that slows down slows all of them; a speed-up
is a ratio within a round. What a setting costs besides time (operations, memory, cache) and its pictures come from
untimed runs before the rounds; every timed run is checked against those pictures.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
from tqdm import tqdm

from draftdiff.compare.comparison import Comparison
from draftdiff.compare.measure import count_flops, peak_memory
from draftdiff.compare.metrics import Unavailable, lpips, psnr, ssim
from draftdiff.compare.table import Column, megabytes, spread, with_spread
from draftdiff.errors import UserError
from draftdiff.models.image import PLAIN, ImageModel, Setting

COLUMNS: tuple[Column, ...] = (
    ("setting", "setting", str, "plain is the model alone with its whole cache"),
    ("images/s", "images_per_second", with_spread("", 2), "pictures per second of whole calls: median (least-most)"),
    ("speed-up", "speedup", with_spread("x", 2), "plain time over this time in the same round: median (least-most)"),
    (
        "predicted",
        "predicted_speedup",
        "{:.2f}x".format,
        "plain operations over these: the speed-up if all operations took the same time",
    ),
    ("memory", "memory", megabytes, "most memory of a call above what was in use before it: its weights are left out"),
    ("cache", "cache", megabytes, "most bytes of keys and values held between two scales, measured"),
    ("of plain", "cache_share", "{:.0%}".format, "the cache as a share of the plain one"),
    ("PSNR", "psnr", "{:.1f} dB".format, "against the plain picture of the same seed, RGB, mean; 100 is identical"),
    ("SSIM", "ssim", "{:.3f}".format, "structural similarity to the plain picture, RGB; 1 is identical"),
    ("ST-LPIPS", "lpips", "{:.3f}".format, "learned perceptual distance (shift-tolerant, AlexNet); 0 is identical"),
    ("class right", "accuracy", "{:.0%}".format, "share of pictures that show their class, by the rule-based judge"),
)


@dataclass
class SettingResult:
    """pictures: uint8 [pictures, height, width, 3].  flops: of the whole call, as counted while it ran.
    memory: most bytes above what was in use before, None where unknown.  cache: bytes held after each scale.
    quality: against the plain pictures, by metric.  right: whether each picture shows its class.
    repeat_error: largest difference of a timed run's pictures to `pictures`, of 255."""

    setting: Setting
    pictures: np.ndarray
    flops: int
    memory: int | None
    cache: list[int]
    seconds: list[float] = field(default_factory=list)
    quality: dict[str, float] = field(default_factory=dict)
    right: list[bool] | None = None
    repeat_error: int = 0


@dataclass
class ImageComparison(Comparison[SettingResult]):
    """Results, the plain setting first. call: arguments of the pipeline's call.  missing: metrics, and why.
    about: where and with what it ran."""

    made_by = "draftdiff image --compare"
    columns = COLUMNS

    model: str
    subjects: list[Any]
    seed: int
    call: dict[str, Any]
    results: list[SettingResult]
    missing: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def row(self, result: SettingResult) -> dict[str, Any]:
        count, others = len(self.subjects), result is not self.baseline
        held = max(result.cache)
        return {
            "setting": result.setting.name,
            "images_per_second": spread([count / seconds for seconds in result.seconds]),
            "seconds_per_image": spread([seconds / count for seconds in result.seconds]),
            "speedup": spread([base / own for base, own in zip(self.baseline.seconds, result.seconds)])
            if others
            else None,
            "predicted_speedup": self.baseline.flops / result.flops if others else None,
            "flops": result.flops,
            "memory": result.memory,
            "cache": held,
            "cache_share": held / max(self.baseline.cache) if others else None,
            "psnr": result.quality.get("psnr"),
            "ssim": result.quality.get("ssim"),
            "lpips": result.quality.get("lpips"),
            "accuracy": fmean(result.right) if result.right else None,
        }

    def notes(self) -> list[str]:
        notes = [f"no {name.upper()}: {reason}" for name, reason in self.missing.items()]
        notes += [
            f"{result.setting.name} did not repeat its pictures: they differ by up to {result.repeat_error} of 255"
            for result in self.results
            if result.repeat_error > 1  # rounding
        ]
        return notes

    def content(self) -> dict[str, Any]:
        settings = [
            {
                **row,
                **asdict(result.setting),
                "seconds": result.seconds,
                "cache_after_each_scale": result.cache,
                "right": result.right,
                "repeat_error": result.repeat_error,
            }
            for result, row in zip(self.results, self.rows())
        ]
        return {
            "model": self.model,
            "subjects": self.subjects,
            "seed": self.seed,
            "call": self.call,
            "missing": self.missing,
            "settings": settings,
        }


def compare_images(
    model: ImageModel,
    subjects: Sequence[Any],
    settings: Sequence[Setting],
    *,
    repeat: int = 3,
    seed: int = 0,
    call: dict[str, Any] | None = None,
    about: dict[str, Any] | None = None,
    progress: bool = True,
) -> ImageComparison:
    """Run the plain model and every setting on all subjects as one batch, `repeat` times, and compare.

    subjects: class names or ids, or prompts, one per picture.  call: further arguments of the pipeline's call.
    about: where and with what it runs, for the report.
    The model is left plain. Raises UserError for no subjects or settings, or a setting that the model cannot have.
    """
    call = dict(call or {})
    if not subjects or not settings:
        raise UserError("a comparison needs at least one picture and one setting besides plain")
    if repeat < 1:
        raise UserError(f"repeat must be at least 1, got {repeat}")
    for setting in settings:
        model.check(setting, call)
    every = [PLAIN, *(setting for setting in dict.fromkeys(settings) if setting != PLAIN)]
    model.pipeline.set_progress_bar_config(disable=True)
    results: list[SettingResult] = []
    try:
        with tqdm(total=len(every) * (2 + repeat), desc="compare", unit="run", disable=not progress) as bar:
            for setting in every:
                bar.set_postfix_str(f"{setting.name} (warm-up)")
                results.append(untimed(model, setting, subjects, seed, call))
                bar.update(2)
            for result in (result for _ in range(repeat) for result in results):
                bar.set_postfix_str(result.setting.name)
                model.apply(result.setting)
                start = time.perf_counter()
                pictures = model.pictures(subjects, seed, **call)
                result.seconds.append(time.perf_counter() - start)  # the pictures are on the host: nothing still runs
                error = np.abs(pictures.astype(np.int16) - result.pictures).max()
                result.repeat_error = max(result.repeat_error, int(error))
                bar.update()
    finally:
        model.apply(PLAIN)
        model.pipeline.set_progress_bar_config(disable=False)
    missing = _judge(results, subjects, model)
    return ImageComparison(model.name, list(subjects), seed, call, results, missing, dict(about or {}))


def untimed(
    model: ImageModel, setting: Setting, subjects: Sequence[Any], seed: int, call: dict[str, Any]
) -> SettingResult:
    """All about a setting that needs no clock. It also warms up."""
    held: list[int] = []

    def look(_pipeline: Any, _scale: int, _step: int, tensors: dict[str, Any]) -> dict[str, Any]:
        held.append(tensors["cache"].nbytes)
        return {}

    looking = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["cache"]}
    model.apply(setting)
    pictures, flops = count_flops(lambda: model.pictures(subjects, seed, **call, **looking))
    _, memory = peak_memory(lambda: model.pictures(subjects, seed, **call), model.device)
    return SettingResult(setting, pictures, flops, memory, held)


def _judge(results: list[SettingResult], subjects: Sequence[Any], model: ImageModel) -> dict[str, str]:
    """Fill in quality and verdicts; returns the metrics that cannot be had, and why."""
    missing: dict[str, str] = {}
    plain = results[0].pictures
    for result in results:
        if model.judge is not None:
            result.right = [model.judge(subject, picture) for subject, picture in zip(subjects, result.pictures)]
        if result is results[0]:
            continue
        for metric in (psnr, ssim, lpips):
            try:
                result.quality[metric.__name__] = metric(result.pictures, plain)
            except Unavailable as reason:  # noqa: PERF203
                missing[metric.__name__] = str(reason)
    return missing
