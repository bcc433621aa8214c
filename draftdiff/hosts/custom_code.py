"""A model's folder may bring code of its own: it is never run, and nobody is asked whether it should be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import dynamic_module_utils


@contextmanager
def never_asked() -> Iterator[None]:
    """Around loading by a library that leaves the question to transformers, as diffusers does for a pipeline's parts:
    instead of asking on the terminal whether to run a folder's code, transformers raises ValueError."""
    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds
