"""The file that `draftdiff image calibrate` makes for ScaleKV: which layers look widely, and what each head misses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftdiff.errors import UserError, user_errors
from draftdiff.models.image import ImageModel
from draftdiff.pipelines.var import VARPipeline
from draftdiff.stored import read_json
from draftdiff.var.head_budgets import check_missed

DRAFTERS = {"drafters": "transformer", "refiner_drafters": "refiner"}


def calibrated(model: ImageModel, subjects: Sequence[Any], seed: int, share: float, call: dict[str, Any]) -> dict:
    """Drafter layers by scale of the model, and of its refiner where there is one, with the index that they were chosen
    by: [layers][scales], None where there is no history; and what each head misses, [layers][scales][heads][shares].
    The model must be plain."""
    found: dict[str, Any] = {}
    pipeline = model.pipeline
    models = {"drafters": pipeline}
    if model.refiner is not None:
        models["refiner_drafters"] = VARPipeline(model.refiner, pipeline.vae, pipeline.scheduler)
    for name, pipe in models.items():
        pipe.set_progress_bar_config(disable=True)  # there is one over the subjects
        ids = pipeline.get_label_ids(subjects) if model.by_class else subjects
        measured = pipe.calibrate_scale_kv(ids, generator=torch.Generator().manual_seed(seed), **call)
        found[name] = {scale: list(layers) for scale, layers in measured.wide_layers(share).items()}
        found[name.replace("drafters", "index")] = _listed(measured.index.tolist())
        found[name.replace("drafters", "missed")] = _listed(measured.missed.round(decimals=6).tolist())
    return found


def with_calibration(model: ImageModel, path: Path) -> ImageModel:
    """The model with what such a file found. Raises UserError, naming it, for a file that is none or of another model.

    A file from before there were budgets per head lacks what heads miss, and serves for layers.
    """
    with user_errors(FileNotFoundError):
        content = read_json(path, "file of draftdiff image calibrate")
    wide = {name: content[name] for name in DRAFTERS if content.get(name) is not None}
    if "drafters" not in wide or not all(map(_are_layers, wide.values())):
        raise UserError(f"drafters file {str(path)!r} was not made by draftdiff image calibrate")
    config = model.pipeline.transformer.config
    if content.get("layers") != config.num_layers:
        raise UserError(
            f"drafters file {str(path)!r} is of a model with {content.get('layers')} layers, "
            f"this one has {config.num_layers}"
        )
    if any(layer >= content["layers"] for layers in wide["drafters"].values() for layer in layers):
        raise UserError(f"drafters file {str(path)!r} names layers that its model does not have")
    found: dict[str, Any] = {
        name: {int(scale): tuple(layers) for scale, layers in of_scales.items()} for name, of_scales in wide.items()
    }
    for name, of_model in (("missed", config), ("refiner_missed", model.refiner and model.refiner.config)):
        if content.get(name) is not None and of_model is not None:
            found[name] = _missed(path, content[name], of_model)
    return replace(model, drafters=found)


def _are_layers(wide: Any) -> bool:
    """Whether it is lists of layers by the number of their scale, as JSON has them."""
    return isinstance(wide, dict) and all(
        scale.isdecimal() and isinstance(layers, list) and all(type(layer) is int and layer >= 0 for layer in layers)
        for scale, layers in wide.items()
    )


def _missed(path: Path, values: Any, config: Any) -> Tensor:
    try:
        found = torch.tensor(_listed(values, none=math.nan), dtype=torch.float64)
        return check_missed(found, config.num_layers, config.num_attention_heads)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"drafters file {str(path)!r} does not fit this model: {error}") from None


def _listed(values: Any, none: float | None = None) -> Any:
    """Nested lists as JSON can hold them, or back: None for NaN, or what `none` is for None."""
    if isinstance(values, list):
        return [_listed(value, none) for value in values]
    return none if values is None or math.isnan(values) else values
