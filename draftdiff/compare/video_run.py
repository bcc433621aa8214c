"""From settings to measured videos: every setting on the same prompts and seeds, in turns, in one process.

A round runs each setting once, the dense pipeline among them, so that a machine that slows down slows all of them; a
speed-up is a ratio within a round. The dense pipeline is the stock one; its clocked runs are apart.
"""

from __future__ import annotations

import inspect
import time
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from draftdiff.compare.clips import SIDE_BY_SIDE, file_name
from draftdiff.compare.metrics import quality
from draftdiff.compare.timing import Timing
from draftdiff.compare.video import DENSE, Clip, SettingResult, VideoComparison
from draftdiff.errors import UserError
from draftdiff.models.frames import frames_of
from draftdiff.models.loading import inputs_refused
from draftdiff.models.setup import with_cache
from draftdiff.models.video import Judge
from draftdiff.video.config import DraftAttentionConfig
from draftdiff.video.patch import disable, enable, report
from draftdiff.video.report import TransformerReport

_CACHE = "cache"
_CLOCKED = DraftAttentionConfig(dense_steps=1.0)  # dense, with clocks


def compare_videos(
    pipeline: Any,
    prompts: list[str],
    settings: dict[str, DraftAttentionConfig],
    *,
    repeat: int = 3,
    seed: int = 0,
    call_kwargs: dict[str, Any] | None = None,
    cache: str | None = None,
    judge: Judge | None = None,
    fps: float = 16,
    about: dict[str, Any] | None = None,
    progress: bool = True,
) -> VideoComparison:
    """Run the dense pipeline and every setting on every prompt, `repeat` times, and compare time and videos.

    pipeline: a loaded diffusers pipeline; draftdiff is disabled on it afterwards.  settings: by name.
    repeat: timed rounds, after an untimed warm-up.  seed: of the noise, the same for all prompts and settings.
    call_kwargs: further arguments of the pipeline's call.  cache: one that is tried alone and with each setting, as
    `models.setup.enable_cache` takes it.  judge: (prompt, frames) -> what of the prompt is right.
    fps: of the videos to write.  about: where and with what it runs, for the report.
    Raises UserError for no prompts or settings, or a setting called "dense".
    """
    _check(prompts, settings, repeat)
    call = dict(call_kwargs or {})
    dense = SettingResult(DENSE, None)
    results = [dense, *(SettingResult(name, config) for name, config in settings.items())]
    if cache is not None:
        results[1:1] = [SettingResult(_CACHE, None, cached=True)]
        results += [SettingResult(f"{name} + {_CACHE}", config, cached=True) for name, config in settings.items()]
    warm_up = {"num_inference_steps": 2} if "num_inference_steps" in _parameters(pipeline) else {}
    total = len(results) + repeat * len(prompts) * (1 + len(results))
    try:
        with tqdm(total=total, desc="compare", unit="run", disable=not progress) as bar, inputs_refused(pipeline):
            for result in results:
                bar.set_postfix_str(f"{result.name} (warm-up)")
                # Kernels are compiled and memory is found on first use; the dense steps would hide the sparse ones.
                config = replace(result.config, dense_steps=0) if result.config else None
                with _cached(pipeline, cache, result):
                    run_setting(pipeline, config, prompts[0], seed, {**call, **warm_up})
                bar.update()
            for round_number in range(repeat):
                for rows in (dense.clocked, *(result.timings for result in results)):
                    rows.append([])
                for index, prompt in enumerate(prompts):
                    bar.set_postfix_str("dense (clocked)")
                    dense.clocked[-1].append(run_setting(pipeline, _CLOCKED, prompt, seed, call).timing)
                    bar.update()
                    for result in results:
                        bar.set_postfix_str(result.name)
                        with _cached(pipeline, cache, result):
                            run = run_setting(pipeline, result.config, prompt, seed, call)
                        result.timings[-1].append(run.timing)
                        if round_number == 0:
                            base = None if result is dense else dense.clips[index]
                            result.clips.append(first_look(run, base, judge(prompt, run.frames) if judge else None))
                        bar.update()
    finally:
        disable(pipeline)
    return VideoComparison(type(pipeline).__name__, list(prompts), seed, call, results, fps, dict(about or {}))


def _cached(pipeline: Any, cache: str | None, result: SettingResult) -> AbstractContextManager[None]:
    return with_cache(pipeline, cache) if cache is not None and result.cached else nullcontext()


def _check(prompts: list[str], settings: dict[str, DraftAttentionConfig], repeat: int) -> None:
    if not prompts or not settings:
        raise UserError("compare needs at least one prompt and one setting")
    if DENSE in settings:
        raise UserError(f"a setting cannot be called {DENSE!r}: that is what the others are compared with")
    if len({file_name(0, name, 1) for name in (DENSE, SIDE_BY_SIDE, *settings)}) < len(settings) + 2:
        raise UserError(f"settings must differ in letters or digits, for their files: {', '.join(settings)}")
    if repeat < 1:
        raise UserError(f"repeat must be at least 1, got {repeat}")


@dataclass
class Run:
    """One call of a pipeline. frames: uint8 [frames, height, width, 3].  latents: the last, None where not told.
    reports: one per transformer, none of the stock pipeline."""

    frames: np.ndarray
    latents: Tensor | None
    reports: list[TransformerReport]
    timing: Timing


def run_setting(
    pipeline: Any,
    config: DraftAttentionConfig | None,
    prompt: str,
    seed: int,
    call: dict[str, Any],
    *,
    keep: bool = False,
) -> Run:
    """Switched to a setting; None is the stock pipeline. keep: with the hooks that it has instead."""
    if not keep:
        disable(pipeline)
    if config is not None:
        enable(pipeline, config)
    frames, latents, seconds = _timed_call(pipeline, prompt, seed, call)
    reports = [] if config is None else report(pipeline).transformers
    parts: Counter[str] = Counter()
    for one in reports:
        parts.update(one.seconds)
    return Run(frames, latents, reports, Timing(seconds, dict(parts)))


def _timed_call(pipeline: Any, prompt: str, seed: int, call: dict[str, Any]) -> tuple[np.ndarray, Tensor | None, float]:
    """Frames, final latents if the pipeline tells them, and seconds of one call."""
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
    return frames_of(output), last[0].cpu() if last else None, seconds


def first_look(run: Run, dense: Clip | None, verdict: dict[str, bool] | None) -> Clip:
    """What there is to see of a setting's first run, against the dense clip unless it is that one."""
    reports = [one.to_dict() for one in run.reports]
    clip = Clip(run.frames, reports, verdict=verdict, latents=run.latents)
    if dense is not None:
        clip.quality = quality(run.frames, dense.frames, run.latents, dense.latents)
    return clip


def _parameters(pipeline: Any) -> Any:
    return inspect.signature(type(pipeline).__call__).parameters
