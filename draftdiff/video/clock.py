"""Time spent in named parts of a run, without making a GPU wait."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Adds up seconds per part. On CUDA, events are recorded and read when `seconds` is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, start: float | torch.cuda.Event) -> None:
        """Count the time since `start`, a value of `now`, under a name."""
        end = self.now()
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            self._events.append((name, start, end))
        elif isinstance(start, float) and isinstance(end, float):
            self._seconds[name] += end - start

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.add(name, start)

    def seconds(self) -> dict[str, float]:
        for name, start, end in self._events:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1000
        self._events.clear()
        return dict(self._seconds)
