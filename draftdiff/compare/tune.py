"""From a target to a profile: what to compute where, found from one recorded dense run a prompt and checked on renders.

Recorded errors are local: what an error of a layer or of a step means for the video is learnt from a few renders in
which that layer, or that stretch of steps, is sparse alone. What is left is a search along one line, from the least
work to dense attention, whose points are rendered until the cheapest that meets the target is found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from draftdiff.compare.metrics import Unavailable, lpips, psnr
from draftdiff.compare.tune_line import Line, bands_of
from draftdiff.compare.tuning import Check, Target, Tuning, log10
from draftdiff.compare.video_run import Run, run_setting
from draftdiff.core.allocation import Allocation
from draftdiff.errors import UserError
from draftdiff.hosts.diffusers import heads_of
from draftdiff.models.devices import versions
from draftdiff.models.loading import inputs_refused
from draftdiff.video.config import DraftAttentionConfig, MadeFor
from draftdiff.video.layouts import layout_for, layout_name
from draftdiff.video.patch import check, disable, transformers_of, unwrapped
from draftdiff.video.profile import Profile
from draftdiff.video.sensitivity import Sensitivity, recording
from draftdiff.video.tasks import attentions_of

BASE = DraftAttentionConfig(selection="error", tokens=0.25)
LADDER = (0.05, 0.1, 0.2, 0.35, 0.5, 1.0)
_SINGLE = (0.0, 0.25, 0.5)  # shares of the base's budget that are spent on single tokens, each a choice
_STRETCHES = 5  # of steps
_LEARNT = 2  # prompts that weights are learnt from: what one run makes of an error is much by chance
_CHECKS = 6  # points that are rendered at most


def tune(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    target: str,
    call_kwargs: dict[str, Any] | None = None,
    config: DraftAttentionConfig | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Profile:
    """The least work that makes these prompts' videos meet a target, as a profile; see `search` for the arguments."""
    return search(
        pipeline, prompts, target=target, call_kwargs=call_kwargs, config=config, seed=seed, progress=progress
    ).profile


def search(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    target: str,
    call_kwargs: dict[str, Any] | None = None,
    config: DraftAttentionConfig | None = None,
    seed: int = 0,
    about: dict[str, Any] | None = None,
    progress: bool = True,
) -> Tuning:
    """Find a profile.

    pipeline: a loaded diffusers pipeline; draftdiff is disabled on it afterwards.  prompts: to calibrate with.
    target: "35 dB" or "lpips 0.05" against dense, or "1.8x" as fast as dense.  call_kwargs: further arguments of the
    pipeline's call.  config: whose rule, tiles and backend are taken; how much is computed where, is found.
    seed: of the noise.  about: where and with what it runs, for the report.
    Raises UserError for a target that cannot be read or met, and what `enable` refuses.
    """
    goal, base, prompts = Target.of(target), _base(pipeline, config), list(prompts)
    if not prompts:
        raise UserError("tune needs at least one prompt")
    call = dict(call_kwargs or {})
    runs = _CHECKS * len(prompts) * (2 if goal.kind == "speedup" else 1)
    try:
        with _renderer(pipeline, base, prompts, seed, call, runs, progress) as renderer:
            found, dense = _recorded(renderer, base, prompts)
            if goal.kind == "lpips":
                _needs_lpips(dense[0])
            line, probes = _learnt(renderer, base, prompts, found, dense)
            known = [(1.0, goal.beyond(1.0))]  # dense attention is as fast as itself
            if goal.kind != "speedup":
                known = [(log10(lost), goal.beyond(fmean(map(goal.of_run, seen, dense)))) for lost, seen in probes]
            checks, chosen = _walk(line, goal, known, renderer, prompts, dense, renderer.bar)
    finally:
        disable(pipeline)
    best = checks[chosen]
    assert found.grid is not None
    row = {
        "prompts": prompts,
        "seed": seed,
        "call": {k: v for k, v in call.items() if isinstance(v, (str, int, float))},
    }
    measured = row | {name: getattr(best, name) for name in ("psnr", "lpips", "seconds", "speedup")}
    measured["work"] = best.allocation.work
    profile = Profile(best.config, found.grid, found.steps, str(goal), measured, versions())
    weights = {"steps": line.of_steps.tolist(), "layers": line.of_layers.tolist()}
    return Tuning(type(pipeline).__name__, prompts, seed, goal, profile, checks, chosen, weights, dict(about or {}))


def of_as_many_pairs(
    pipeline: Any,
    prompts: Sequence[str],
    other: DraftAttentionConfig,
    *,
    call_kwargs: dict[str, Any] | None = None,
    config: DraftAttentionConfig | None = None,
    seed: int = 0,
) -> DraftAttentionConfig:
    """The point of the line of `search` that computes as many query-key pairs as another config, where work is counted
    in pairs and not in time: for comparisons that do not depend on the machine. Arguments are those of `search`."""
    base, prompts = _base(pipeline, config), list(prompts)
    try:
        with _renderer(pipeline, base, prompts, seed, dict(call_kwargs or {}), 0, progress=True) as renderer:
            found, dense = _recorded(renderer, base, prompts)
            line, _ = _learnt(renderer, base, prompts, found, dense)
    finally:
        disable(pipeline)
    line.costs, line.dense = torch.stack(found.pairs).mean(0), 1.0
    share = _share_of_pairs(other, found.steps, found.layers, found.heads)
    best = min(line.points(), key=lambda one: abs(one.work - share))
    return line.config(best.density, best.single)


def _share_of_pairs(config: DraftAttentionConfig, steps: int, layers: int, heads: int) -> float:
    """Of the pairs of video tokens of all layers and steps."""
    sparse = len(config.sparse_steps(steps))
    kept = torch.stack([config.budget.density(layers, heads, at / sparse).mean(1) for at in range(sparse)]).sum(0)
    of_layers = [sparse if config.is_dense_layer(layer) else float(kept[layer]) for layer in range(layers)]
    return (steps - sparse + fmean(of_layers)) / steps


def _base(pipeline: Any, config: DraftAttentionConfig | None) -> DraftAttentionConfig:
    base = check(pipeline, config or BASE)
    model = unwrapped(transformers_of(pipeline)[0])
    layers = attentions_of(model, layout_for(model).attention)
    return replace(base, made_for=MadeFor(layout_name(model), len(layers), heads_of(layers[0][1])))


@contextmanager
def _renderer(
    pipeline: Any,
    base: DraftAttentionConfig,
    prompts: list[str],
    seed: int,
    call: dict[str, Any],
    more: int,
    progress: bool,
) -> Iterator[_Renderer]:
    """more: runs beyond those that record and learn, at most."""
    assert base.made_for is not None
    runs = 2 * len(prompts) + len(prompts[:_LEARNT]) * (_STRETCHES + len(bands_of(base.made_for.layers)))
    with tqdm(total=runs + more, desc="tune", unit="run", disable=not progress) as bar, inputs_refused(pipeline):
        yield _Renderer(pipeline, seed, call, bar)


def _recorded(renderer: _Renderer, base: DraftAttentionConfig, prompts: list[str]) -> tuple[Sensitivity, list[Run]]:
    """What the prompts' runs show, and a dense run of each."""
    renderer.bar.set_postfix_str("recording")
    single = sorted({share * (1 - base.budget.sparsity) for share in _SINGLE if _may_be_single(base, share)})
    with recording(renderer.pipeline, base, LADDER, single) as found:
        for prompt in prompts:
            renderer(None, prompt, keep=True)
    renderer.bar.set_postfix_str("dense")  # after a first use of everything, since its time counts
    return found, [renderer(None, prompt) for prompt in prompts]


def _learnt(
    renderer: _Renderer, base: DraftAttentionConfig, prompts: list[str], found: Sensitivity, dense: list[Run]
) -> tuple[Line, list[tuple[float, list[Run]]]]:
    """The line, and the renders that its weights were learnt from, as `Line.learn` tells."""
    line = Line(found, base, min(_STRETCHES, found.steps))
    renderer.bar.set_postfix_str("weights")

    def rendered(config: DraftAttentionConfig) -> list[Run]:
        return [renderer(config, prompt) for prompt in prompts[:_LEARNT]]

    return line, line.learn(rendered, dense, bands_of(found.layers))


def _may_be_single(config: DraftAttentionConfig, share: float) -> bool:
    return share == 0 or config.selection in ("draft", "error")


def _needs_lpips(run: Run) -> None:
    try:
        lpips(run.frames, run.frames)
    except Unavailable as error:
        raise UserError(f"a target of lpips {error}") from None


@dataclass
class _Renderer:
    """Runs the pipeline, dense for None, and tells the bar. keep: with the hooks that are there."""

    pipeline: Any
    seed: int
    call: dict[str, Any]
    bar: tqdm

    def __call__(self, config: DraftAttentionConfig | None, prompt: str, keep: bool = False) -> Run:
        run = run_setting(self.pipeline, config, prompt, self.seed, self.call, keep=keep)
        self.bar.update()
        return run


def _walk(
    line: Line,
    goal: Target,
    first: list[tuple[float, float]],
    render: _Renderer,
    prompts: list[str],
    dense: list[Run],
    bar: tqdm,
) -> tuple[list[Check], int]:
    """Rendered points of the line, and which of them meets the target with the least work (or, of a speed, loss).

    first: what is known before of where a point lies and how far it is beyond the target.
    """
    points = [one for one in line.points() if one.work < 1]
    if not points:
        raise UserError("nothing can be tuned: dense attention is the fastest here, at any density")
    fast = goal.kind == "speedup"
    # From what surely misses the target to what surely meets it.
    points = points[::-1] if fast else points
    at = [one.work if fast else log10(max(one.loss, 1e-300)) for one in points]
    missed, met = -1, len(points)
    known: list[tuple[float, float]] = []
    checks: list[Check] = []
    places: list[int] = []
    now = _predicted(at, first)
    for _ in range(_CHECKS):
        one = points[now]
        checks.append(_checked(line.config(one.density, one.single), one, fast, render, prompts, dense, bar))
        places.append(now)
        beyond = goal.beyond(checks[-1].value(goal.kind))
        known.append((at[now], beyond))
        missed, met = (missed, now) if beyond >= 0 else (now, met)
        if met - missed <= 1 or 0 <= beyond <= Target.close[goal.kind]:
            break
        now = min(max(_predicted(at, first + known if fast else known), missed + 1), met - 1)
    if met == len(points):
        best = max(checks, key=lambda check: goal.beyond(check.value(goal.kind)))
        raise UserError(f"target {goal} was not met: the best of {len(checks)} checks has {_told(best, goal.kind)}")
    bar.total = bar.n
    bar.refresh()
    return checks, places.index(met)


def _predicted(at: list[float], known: list[tuple[float, float]]) -> int:
    """The first point that should meet the target, by a line through the two known ones that are nearest to it; that in
    the middle if nothing is known."""
    if not known:
        return len(at) // 2
    nearest = sorted(known, key=lambda point: abs(point[1]))[:2]
    (x, y), slope = nearest[0], -1.0
    if len(nearest) > 1 and abs(nearest[1][0] - x) > 1e-9:
        through = (nearest[1][1] - y) / (nearest[1][0] - x)
        slope = through if through < 0 else slope
    wanted = x - y / slope
    return next((place for place, here in enumerate(at) if here <= wanted), len(at) - 1)


def _checked(
    config: DraftAttentionConfig,
    allocation: Allocation,
    in_turns: bool,
    render: _Renderer,
    prompts: list[str],
    dense: list[Run],
    bar: tqdm,
) -> Check:
    """in_turns: dense once more beside every render, so that a machine that slows down slows both."""
    bar.set_postfix_str(f"check at {allocation.work:.2f} of dense work")
    check = Check(allocation, config)
    for prompt, truth in zip(prompts, dense):
        again = render(None, prompt) if in_turns else truth
        run = render(config, prompt)
        check.psnr.append(psnr(run.frames, truth.frames))
        try:
            check.lpips.append(lpips(run.frames, truth.frames))
        except Unavailable:
            check.lpips.append(None)
        check.seconds.append(run.timing.seconds)
        check.speedup.append(again.timing.seconds / run.timing.seconds)
        check.pairs.append(torch.cat([one.density.flatten() for one in run.reports]).nanmean().item())
    return check


def _told(check: Check, kind: str) -> str:
    return {"psnr": "{:.1f} dB", "lpips": "lpips {:.3f}", "speedup": "{:.2f}x"}[kind].format(check.value(kind))
