"""Time spent in named parts of a run, without making a GPU wait where it can be helped."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Devices whose streams take timing events.
_WITH_EVENTS = ("cuda", "xpu")


class Clock:
    """Adds up seconds per part. Where there are timing events they are recorded, and read when `seconds` is asked for;
    other accelerators are waited for at both ends of a part."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.Event, torch.Event]] = []

    def now(self) -> Any:
        """A moment, for `add`."""
        if self._device.type in _WITH_EVENTS:
            event = torch.Event(self._device, enable_timing=True)
            event.record()
            return event
        if self._device.type != "cpu" and torch.accelerator.is_available():
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()

    def add(self, name: str, start: Any) -> None:
        """Count the time since `start`, a value of `now`, under a name."""
        end = self.now()
        if isinstance(end, float):
            self._seconds[name] += end - start
        else:
            self._events.append((name, start, end))

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
