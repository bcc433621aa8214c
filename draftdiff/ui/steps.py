"""Steps of any diffusers pipeline as they are made: how many, how long the rest takes, a way to stop between two."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


class Cancelled(Exception):
    """A run was stopped between two steps, as it was asked to be."""


@dataclass(frozen=True)
class Progress:
    """Of one run. what: its name.  step: those that are done.  steps: of all, 0 before they are known.  left: seconds,
    None before the first step is done."""

    what: str
    step: int
    steps: int
    left: float | None

    def __str__(self) -> str:
        if not self.steps:
            return self.what
        left = "" if self.left is None else f", {self.left:.0f} s left"
        return f"{self.what}: step {self.step} of {self.steps}{left}"


class Steps:
    """Stands in for the progress bar that a pipeline asks for; `after` is called when a step is done."""

    def __init__(self, after: Callable[[int, int], None], iterable: Iterable[Any] | None, total: int | None) -> None:
        self._after, self._iterable, self.n = after, iterable, 0
        self.total = len(iterable) if total is None and isinstance(iterable, Sized) else total or 0

    def update(self, n: int = 1) -> None:
        self.n += n
        self._after(self.n, self.total)

    def __iter__(self) -> Iterator[Any]:
        for one in self._iterable or ():
            yield one
            self.update()

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None  # what else a bar is asked to show: set_postfix, close, ...


@contextmanager
def watched(
    pipeline: Any, what: str, tell: Callable[[Progress], None], is_cancelled: Callable[[], bool]
) -> Iterator[None]:
    """Around a call of a pipeline: `tell` is called after each step. Raises Cancelled, inside, between two steps."""
    start = time.perf_counter()

    def after(step: int, steps: int) -> None:
        if is_cancelled():
            raise Cancelled
        left = (time.perf_counter() - start) / step * max(0, steps - step)
        tell(Progress(what, step, steps, left))

    pipeline.progress_bar = lambda iterable=None, total=None: Steps(after, iterable, total)
    try:
        if is_cancelled():
            raise Cancelled
        tell(Progress(what, 0, 0, None))
        yield
    finally:
        del pipeline.progress_bar
