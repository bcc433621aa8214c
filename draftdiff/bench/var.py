"""VAR and Infinity at their released sizes, with random weights: plain, with CoDe, with ScaleKV, with both.

Nothing is downloaded. Beside each measured speed-up stands the one that the counted operations predict. Times are those
of the scales; the autoencoder's decoder, the same in all settings, is left out as in the papers. On a CPU the models
are small: a fraction of the width and depth, all scales of VAR, 512 pixels for Infinity.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from draftdiff.bench.runner import Routine, check_names, in_turns, reason_of, release, timed
from draftdiff.bench.var_models import MODELS, BenchModel, RandomModel, build, subjects
from draftdiff.compare.image import ImageComparison, SettingResult, untimed
from draftdiff.compare.table import Column, megabytes, text_table, with_spread
from draftdiff.core.devices import dtype_named
from draftdiff.errors import user_errors
from draftdiff.models.image import PLAIN, Setting, settings_of
from draftdiff.var.scale_kv import check_cache_budget

COLUMNS: tuple[Column, ...] = (
    ("setting", "setting", str, ""),
    ("per image", "seconds_per_image", with_spread(" s", 3), ""),
    ("speed-up", "speedup", with_spread("x", 2), ""),
    ("predicted", "predicted_speedup", "{:.2f}x".format, ""),
    ("memory", "memory_total", megabytes, ""),
    ("cache", "cache", megabytes, ""),
    ("of plain", "cache_share", "{:.1%}".format, ""),
    ("", "skipped", str, ""),
)
# Of the comparison's figures. memory: most bytes above the weights; memory_total: with the weights in use.
SHARED = ("seconds_per_image", "speedup", "predicted_speedup", "flops", "memory", "cache", "cache_share")
OWN = ("seconds", "weights", "memory_total", "cache_after_each_scale")


class Var(Routine):
    name = "var models"
    file = "{device}-var"
    key = "results"
    picture = "var"

    def __init__(self, options: Namespace) -> None:
        super().__init__(options)
        check_names("--models", options.models or [], MODELS)
        with user_errors():
            for value in options.budgets:
                check_cache_budget(value)
        self.draft_scales = list(dict.fromkeys(options.draft_scales))
        self.budgets = list(dict.fromkeys(options.budgets))
        self.dtype = dtype_named(options.dtype or ("bfloat16" if self.on_gpu else "float32"))

    def cases(self) -> list[tuple[str, int]]:
        return [
            (name, batch)
            for name in self.options.models or MODELS
            for batch in dict.fromkeys(self.options.batch or ((1, 64) if self.on_gpu else MODELS[name].small_batches))
        ]

    def about(self) -> dict[str, Any]:
        return {"measured_on": "a GPU, real sizes" if self.on_gpu else "a CPU, with small versions of the models"}

    def measure(self, case: tuple[str, int]) -> list[dict[str, Any]]:
        """All settings of a model at one batch size; one that does not fit in memory has the reason instead."""
        name, batch = case
        spec: BenchModel = MODELS[name]
        size = spec.full if self.on_gpu else spec.small
        result: dict[str, Any] = {
            "model": name,
            "batch": batch,
            "size": "full" if self.on_gpu else "small",
            "dtype": str(self.dtype).removeprefix("torch."),
            "config": dict(size),
            "rows": [],
        }
        try:
            model = build(spec, size, self.device, self.dtype)
            wanted, call = subjects(model, size, batch)
        except RuntimeError as error:
            if (reason := reason_of(error)) is None:
                raise
            return [result | {"skipped": reason}]
        scales = model.scales(call)
        drafted = [n for n in self.draft_scales if n < scales] if model.refiner is not None else []
        settings = [PLAIN, *settings_of(drafted, self.budgets, scales)]
        results: dict[Setting, SettingResult] = {}

        def make(setting: Setting) -> Callable[[], float]:
            results[setting] = untimed(model, setting, wanted, 0, call)
            return partial(self.timed_again, model, results[setting], wanted, call, f"{name}, batch {batch}")

        seconds, skipped = in_turns({setting: partial(make, setting) for setting in settings}, self.options.rounds)
        for setting, values in seconds.items():
            results[setting].seconds = values
        known = [results[setting] for setting in seconds]
        comparison = ImageComparison(name, list(wanted), 0, call, known)
        result["tokens"] = model.tokens(call)
        for setting in settings:
            about = {"setting": setting.name, "draft_scales": setting.draft_scales, "budget": setting.budget}
            about["skipped"] = skipped.get(setting)
            figures: dict[str, Any] = dict.fromkeys((*SHARED, *OWN))
            if setting in seconds:
                figures = self.figures(model, comparison, results[setting], plain=PLAIN in seconds)
                self.check(figures, results[setting], f"{name}, batch {batch}, {setting.name}")
            result["rows"].append(about | figures)
        release(self.device)
        return [result]

    def timed_again(
        self, model: RandomModel, result: SettingResult, wanted: Any, call: dict[str, Any], where: str
    ) -> float:
        """Seconds of a run, which must make the same latents again."""
        model.apply(result.setting)
        latents, seconds = timed(lambda: model.latents(wanted, 0, **call), self.device)
        if not np.array_equal(latents.float().cpu().numpy(), result.pictures):
            self.failures.append(f"{where}, {result.setting.name}: a round made other latents")
        return seconds

    def figures(
        self, model: RandomModel, comparison: ImageComparison, own: SettingResult, plain: bool
    ) -> dict[str, Any]:
        """The figures of a setting. plain: whether there is something to compare with."""
        shared = comparison.row(own)
        if not plain:
            shared |= dict.fromkeys(("speedup", "predicted_speedup", "cache_share"))
        weights = _bytes(model.pipeline.transformer) + (_bytes(model.refiner) if own.setting.draft_scales else 0)
        total = None if own.memory is None else own.memory + weights
        return {name: shared[name] for name in SHARED} | dict(zip(OWN, (own.seconds, weights, total, own.cache)))

    def check(self, figures: dict[str, Any], own: SettingResult, where: str) -> None:
        share, budget = figures["cache_share"], own.setting.budget
        if not np.isfinite(own.pictures).all():
            self.failures.append(f"{where}: NaN or inf")
        if budget is not None and share is not None and share > 1.02 * budget:
            self.failures.append(f"{where}: the cache is {share:.1%} of the plain one")

    def table(self, payload: Mapping[str, Any]) -> Iterator[str]:
        yield f"{payload['device']}: {payload['measured_on']}"
        for result in payload["results"]:
            yield ""
            yield f"{result['model']}, batch {result['batch']} ({result['size']}, {result['dtype']})"
            yield from [result["skipped"]] if "skipped" in result else text_table(result["rows"], COLUMNS)


def _bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
