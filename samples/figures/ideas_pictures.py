"""Pictures of CoDe and ScaleKV, from the embedded pair of next-scale models."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from ideas_style import AMBER, BLUE, GRAY, ORANGE, PALE, SOFT, panels, picture
from matplotlib.patches import Rectangle

from draftdiff.models.image import PLAIN, ImageModel, Setting, load
from draftdiff.models.image_calibration import calibrated as measured
from draftdiff.pipelines.mini.pictures import class_names
from draftdiff.var.scale_kv import ScaleKVConfig

_CLASSES = ("red circle", "blue square", "green triangle", "yellow circle")
_N = 5


@cache
def _model() -> ImageModel:
    model = load(None, device="cpu")
    model.pipeline.set_progress_bar_config(disable=True)
    return model


@cache
def _pictures(setting: Setting) -> np.ndarray:
    """One picture of each class, uint8 [classes, height, width, 3]."""
    model = _model()
    model.apply(setting)
    labels = model.pipeline.get_label_ids(list(_known()))
    made = model.pictures(labels, 0, **model.defaults)
    model.apply(PLAIN)
    return made


def _known() -> tuple[str, ...]:
    """Class names that the pair has, one of each colour and shape where it can."""
    names = [name for name in class_names().values() if any(word in name for word in _CLASSES)]
    return tuple(next(name for name in names if words in name) for words in _CLASSES)


def code() -> Any:
    model = _model()
    assert model.refiner is not None
    tokens = model.tokens({})
    figure, axes = panels(1.15, 1, height=3.0)
    scales, shown = axes
    place = np.arange(len(tokens))
    colours = [BLUE if n < _N else ORANGE for n in place]
    scales.bar(place, tokens, color=colours)
    for at, count in zip(place, tokens):
        scales.text(at, count + 0.6, str(count), ha="center", fontsize=8.5, color=SOFT)
    sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model.pipeline.transformer, model.refiner)]
    for colour, name, millions in ((BLUE, "drafter", sizes[0]), (ORANGE, "refiner", sizes[1])):
        scales.bar(0, 0, color=colour, label=f"{name}, {millions:.1f} million weights")
    scales.set(xlabel="scale", ylabel="tokens", title=f"N = {_N} of {len(tokens)} scales are drafted", xticks=place)
    scales.grid(axis="x", visible=False)
    scales.legend(loc="upper left")
    both = np.concatenate([_pictures(PLAIN), _pictures(Setting(_N))])
    rows = both.reshape(2, len(_CLASSES), *both.shape[1:])
    side = both.shape[1]
    board = np.full((2 * side + 6, len(_CLASSES) * (side + 3) - 3, 3), 255, np.uint8)
    for down, row in enumerate(rows):
        for right, one in enumerate(row):
            board[down * (side + 6) : down * (side + 6) + side, right * (side + 3) : right * (side + 3) + side] = one
    picture(shown, board, "plain above, CoDe below, the same seeds")
    shown.spines[:].set_visible(False)
    return figure


def scale_kv() -> Any:
    model = _model()
    tokens = model.tokens({})
    labels = model.pipeline.get_label_ids(list(_known()))
    found = measured(model, labels, 0, 0.15, model.defaults)
    index = np.array([[np.nan if value is None else value for value in row] for row in found["index"]])
    wide = found["drafters"]
    figure, (heat, kept, sizes) = panels(1.2, 1, 1.2, height=3.0)
    shown = np.ma.masked_invalid(index)
    image = picture(heat, shown, "selectivity", aspect="auto")
    heat.set(xlabel="scale", ylabel="layer", xticks=range(len(tokens)), yticks=range(len(index)))
    for scale, layers in wide.items():
        for layer in layers:
            heat.add_patch(_frame(scale, layer))
    figure.colorbar(image, ax=heat, shrink=0.85)
    config = ScaleKVConfig(0.2, wide_layers={int(scale): tuple(layers) for scale, layers in wide.items()})
    rows = config.capacities(tokens, len(index))
    held = np.cumsum(tokens)[:-1]
    board = np.array([held[at] * np.ones(len(index)) if row is None else np.minimum(row, held[at])
                      for at, row in enumerate(rows)]).T  # fmt: skip
    image = picture(kept, board, "keys kept, budget 0.2", aspect="auto")
    kept.set(xlabel="after scale", ylabel="layer", xticks=range(len(rows)), yticks=range(len(index)))
    figure.colorbar(image, ax=kept, shrink=0.85)
    whole = held * len(index)
    place = np.arange(len(rows))
    sizes.fill_between(place, whole, color=PALE, label="all")
    sizes.plot(place, whole, color=GRAY)
    sizes.plot(place, board.sum(0), "o-", color=BLUE, label="ScaleKV")
    sizes.set(xlabel="after scale", ylabel="keys in all layers", title="the cache", xticks=place)
    sizes.legend(loc="upper left")
    return figure


def _frame(column: int, row: int) -> Any:
    return Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=AMBER, lw=2.2)


PICTURES = {"code": code, "scale-kv": scale_kv}
