"""What a smaller cache or late scales without guidance change: budgets per layer and per head at equal bytes.

Every setting is led along the plain picture: after each scale it gets the plain latents, and its guided logits are held
against the plain ones there, so that nothing drawn by chance is between the two. Beside it stand the pictures that it
makes by itself. The embedded model is trained; the Infinity-shaped ones have random weights, with temperatures spread
over their heads, and show what budgets cost where heads have learned nothing.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from draftdiff.bench.runner import Routine, check_names, release
from draftdiff.bench.var_models import BenchModel, build, subjects
from draftdiff.compare.measure import count_flops
from draftdiff.compare.metrics import psnr, relative_l2
from draftdiff.compare.table import Column, megabytes, text_table
from draftdiff.errors import user_errors
from draftdiff.models.image import EMBEDDED, PLAIN, ImageModel, Setting, load
from draftdiff.var.scale_kv import check_cache_budget

COLUMNS: tuple[Column, ...] = (
    ("setting", "setting", str, ""),
    ("cache", "cache", megabytes, ""),
    ("of plain", "cache_share", "{:.1%}".format, ""),
    ("logits error", "logits_error", "{:.3%}".format, ""),
    ("last scale", "last_logits_error", "{:.3%}".format, ""),
    ("lower than per layer", "lower", "{:.0%} of pictures".format, ""),
    ("PSNR", "psnr", "{:.1f} dB".format, ""),
    ("class right", "accuracy", "{:.1%}".format, ""),
    ("latents error", "latents_error", "{:.1%}".format, ""),
    ("by operations", "predicted_speedup", "{:.2f}x".format, ""),
)
_TEXT = {"text_dim": 128}
SHAPES: dict[str, BenchModel] = {
    "infinity-2b": BenchModel(
        {"num_layers": 32, "num_attention_heads": 16, "bits": 32, "size": "1M"},
        {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 32, "bits": 32, "size": "0.25M", **_TEXT},
    ),
    "infinity-8b": BenchModel(
        {"num_layers": 40, "num_attention_heads": 28, "bits": 56, "size": "1M"},
        {"num_layers": 5, "num_attention_heads": 4, "attention_head_dim": 32, "bits": 56, "size": "0.25M", **_TEXT},
    ),
}
CALIBRATION = 10  # pictures, as many as the paper of ScaleKV needs


@dataclass(frozen=True)
class Case:
    """A model, what it draws, and the setting by which each row is made: calibrated where it needs one."""

    model: ImageModel
    subjects: Any
    call: dict[str, Any]
    calibrated: ImageModel

    def rows(self, budgets: list[float], unguided: list[int]) -> dict[str, tuple[ImageModel, Setting]]:
        found = {"plain": (self.model, PLAIN)}
        for budget in budgets:
            by_layer, by_head = Setting(budget=budget), Setting(budget=budget, per="head")
            found[f"{by_layer.name} per layer"] = self.model, by_layer
            found[f"{by_layer.name} per layer, calibrated"] = self.calibrated, by_layer
            found[by_head.name] = self.calibrated, by_head
        return found | {Setting(unguided=n).name: (self.model, Setting(unguided=n)) for n in unguided}


class Caches(Routine):
    name = "var caches"
    file = "{device}-var-caches"
    key = "results"

    def __init__(self, options: Namespace) -> None:
        super().__init__(options)
        check_names("--models", options.models or [], [EMBEDDED, *SHAPES])
        with user_errors():
            for value in options.budgets:
                check_cache_budget(value)

    def cases(self) -> list[str]:
        return self.options.models or [EMBEDDED, *SHAPES]

    def about(self) -> dict[str, Any]:
        return {"pictures": self.options.pictures}

    def case(self, name: str) -> Case:
        if name == EMBEDDED:
            model = load(None, device=str(self.device))
            model.pipeline.set_progress_bar_config(disable=True)
            classes = range(model.pipeline.transformer.config.num_classes)
            call = dict(model.defaults)
            # Classes that the calibration does not see.
            seen = list(classes)[:: len(classes) // CALIBRATION][:CALIBRATION]
            wanted: Any = [label for label in classes if label not in seen]
            wanted = [wanted[i * len(wanted) // self.options.pictures] for i in range(self.options.pictures)]
            measured = model.pipeline.calibrate_scale_kv(seen, generator=torch.Generator().manual_seed(1), **call)
        else:
            size = SHAPES[name].full if self.on_gpu else SHAPES[name].small
            torch.manual_seed(0)
            model = build(SHAPES[name], size, self.device, torch.bfloat16 if self.on_gpu else torch.float32)
            _spread_heads(model.pipeline.transformer)
            wanted, call = subjects(model, size, 1)
            other = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(wanted)
            generator = torch.Generator(self.device).manual_seed(1)
            measured = model.pipeline.calibrate_scale_kv([None], prompt_embeds=other, generator=generator, **call)
        drafters = {"drafters": measured.wide_layers(), "missed": measured.missed}
        return Case(model, wanted, call, replace(model, drafters=drafters))

    def measure(self, case: str) -> list[dict[str, Any]]:
        """All settings of a model."""
        found = self.case(case)
        plans = found.rows(self.options.budgets, self.options.unguided)
        rows: dict[str, dict[str, Any]] = {}
        pictures: dict[str, np.ndarray] = {}
        plain: list[dict[str, Tensor]] = []
        for name, (model, setting) in tqdm(plans.items(), desc=case, unit="setting", leave=False):
            model.apply(setting)
            rows[name] = self.led(model, found, setting, plain)
            pictures[name], rows[name]["flops"] = count_flops(partial(model.pictures, found.subjects, 0, **found.call))
        found.model.apply(PLAIN)
        for name, row in rows.items():
            other = name != "plain"
            row["cache_share"] = row["cache"] / rows["plain"]["cache"] if other else None
            row["predicted_speedup"] = rows["plain"]["flops"] / row["flops"] if other else None
            self.judge(row, found, pictures[name], pictures["plain"])
            if row["per"] == "head":
                best = (rows[f"ScaleKV {100 * row['budget']:g}% per layer{rest}"] for rest in ("", ", calibrated"))
                rivals = [min(pair) for pair in zip(*(rival["errors"] for rival in best))]
                row["lower"] = float(np.mean([own < rival for own, rival in zip(row["errors"], rivals)]))
            if row["budget"] is not None and not row["cache_share"] <= row["budget"]:
                self.failures.append(f"{case}, {name}: the cache is {row['cache_share']:.1%} of the plain one")
        release(self.device)
        return [{"model": case, "pictures": len(found.subjects), "rows": [{"setting": n} | r for n, r in rows.items()]}]

    def led(self, model: ImageModel, case: Case, setting: Setting, plain: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Errors of guided logits along the plain picture, relative to their variance over codes, and bytes held.

        plain: latents and logits after each scale; filled by the first call, which is that of the plain setting.
        """
        wrong, right, held = [], [], []
        first = not plain

        def look(_pipeline: Any, scale: int, _step: int, tensors: dict[str, Any]) -> dict[str, Tensor]:
            held.append(tensors["cache"].nbytes)
            logits = tensors["logits"].float()
            if first:
                plain.append({"latents": tensors["latents"].clone(), "logits": logits.clone()})
            wanted = plain[scale]["logits"]
            centred = wanted - wanted.mean(-1, keepdim=True)
            wrong.append((logits - wanted).square().flatten(1).sum(1).double().cpu())
            right.append(centred.square().flatten(1).sum(1).double().cpu())
            return {"latents": plain[scale]["latents"]}

        names = ["latents", "logits", "cache"]
        looking = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": names}
        model.pictures(case.subjects, 0, **case.call, **looking)
        error, wanted = torch.stack(wrong), torch.stack(right)
        return {
            "budget": setting.budget,
            "per": setting.per if setting.budget is not None else None,
            "unguided": setting.unguided,
            "cache": max(held),
            "logits_error": float(error.sum() / wanted.sum()),
            "last_logits_error": float(error[-1].sum() / wanted[-1].sum()),
            "errors": (error.sum(0) / wanted.sum(0)).tolist(),
            "lower": None,
        }

    def judge(self, row: dict[str, Any], case: Case, own: np.ndarray, plain: np.ndarray) -> None:
        """Likeness to the plain pictures, and for the embedded model whether they show their class."""
        judge = case.model.judge
        row |= dict.fromkeys(("psnr", "accuracy", "latents_error"))
        if judge is not None:
            row["accuracy"] = float(np.mean([judge(*pair) for pair in zip(case.subjects, own)]))
        if own is plain:
            return
        if judge is not None:
            row["psnr"] = psnr(own, plain)
        else:
            row["latents_error"] = relative_l2(torch.from_numpy(own), torch.from_numpy(plain))

    def table(self, payload: Mapping[str, Any]) -> Iterator[str]:
        for result in payload["results"]:
            yield ""
            yield f"{result['model']}, {result['pictures']} pictures"
            yield from text_table(result["rows"], COLUMNS)


def _spread_heads(transformer: Any) -> None:
    """Random weights under which attention counts: none fades out, and heads look from widely to at single tokens."""
    generator = torch.Generator(transformer.device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith("log_scale"):
                parameter.uniform_(0.5, math.log(100), generator=generator)
            elif parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
