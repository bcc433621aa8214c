"""Every transformer class of the installed diffusers is known: it has a row, or a reason why it has none."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import diffusers
import pytest
from diffusers import ModelMixin
from diffusers.models import transformers

import draftdiff
from draftdiff.video.layouts import LAYOUTS, NOTHING_TO_WIN


def classes() -> list[type]:
    """All of them, of each module of diffusers.models.transformers."""
    found = []
    for module in pkgutil.iter_modules(transformers.__path__):
        loaded = importlib.import_module(f"{transformers.__name__}.{module.name}")
        found += [
            value
            for value in vars(loaded).values()
            if inspect.isclass(value) and issubclass(value, ModelMixin) and value.__module__ == loaded.__name__
        ]
    return found


@pytest.mark.parametrize("name", [cls.__name__ for cls in classes()])
def test_a_class_has_a_row_or_a_reason(name):
    known = (name in LAYOUTS) + (name in NOTHING_TO_WIN)
    assert known, f"{name} is new: give it a row of draftdiff.video.layouts, or a reason in NOTHING_TO_WIN"
    assert known == 1, f"{name} has both a row and a reason"


def test_there_are_classes_to_know():
    assert len(classes()) >= 45


def test_a_class_without_a_row_is_refused_with_its_reason():
    model = diffusers.DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=4, in_channels=1, num_layers=0)
    with pytest.raises(ValueError, match=r"^DiTTransformer2DModel is not supported, .* nothing to win: 256 to 1,024"):
        draftdiff.enable(model)
