"""What a long run tells while it goes on: beside steps and time left, how much time sparse attention has saved."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CALLBACK = "callback_on_step_end"


@contextmanager
def saving(pipeline: Any, sparse: bool) -> Iterator[dict[str, Any]]:
    """Arguments of a pipeline's call that keep its progress bar told."""
    if not sparse or _CALLBACK not in inspect.signature(type(pipeline).__call__).parameters:
        yield {}
        return
    bars, make = [], pipeline.progress_bar

    def noted(*args: Any, **kwargs: Any) -> Any:
        bars.append(make(*args, **kwargs))
        return bars[-1]

    def tell(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if bars and (text := saved(pipeline)):
            bars[-1].set_postfix_str(text, refresh=False)
        return tensors

    pipeline.progress_bar = noted
    try:
        yield {_CALLBACK: tell}
    finally:
        del pipeline.progress_bar


def saved(pipeline: Any) -> str:
    """What sparse forwards have saved so far, by the mean time of the dense ones of the same run."""
    from draftdiff import report

    total = 0.0
    for one in report(pipeline).transformers:
        sparse = sum(forward.sparse for forward in one.forwards)
        dense = len(one.forwards) - sparse
        if not sparse or not dense:
            return ""
        total += one.seconds.get("dense forward", 0.0) / dense * sparse - one.seconds.get("sparse forward", 0.0)
    return f"sparse attention saved {total:.1f} s" if total > 0 else ""
