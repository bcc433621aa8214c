"""Models without dropout for a while: a Trainer leaves its own in train mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode inside; afterwards each of their modules is in the mode it was in."""
    training = [module for model in models for module in model.modules() if module.training]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module in training:
            module.training = True
