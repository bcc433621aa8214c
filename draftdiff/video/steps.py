"""Which step of a request a transformer call belongs to, and how many the request has.

Users count steps of the request; schedulers may visit a step twice (second order), repeat a timestep or leave out the
first ones (image to video with a strength). So the place is read off the scheduler that is stepping, where one is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(eq=False)
class Pass:
    """One way through a schedule. Long-video pipelines take several in a call.

    schedule: the scheduler's timesteps, whose identity tells one pass from the next; None without a scheduler.
    """

    number: int
    schedule: Tensor | None = None
    start: int = 0  # where in schedule it began
    first: int | None = None  # what the scheduler calls that place
    index: int = -1  # entries of schedule since then
    distinct: int = -1  # timesteps seen so far, less one
    last: float | None = None
    direction: int = 0

    def turns_back(self, noise: float) -> bool:
        """Whether noise moves against the way it went so far: within a pass it moves one way."""
        if self.last is None or noise == self.last:
            return False
        return self.direction != 0 and (noise > self.last) != (self.direction > 0)

    def see(self, noise: float) -> None:
        if noise != self.last:
            self.direction = self.direction or (0 if self.last is None else (1 if noise > self.last else -1))
            self.distinct += 1
        self.last = noise


@dataclass(eq=False)
class Run:
    """One call of a pipeline, or one way of the noise through a transformer that is called on its own."""

    logs: dict[Any, Any] = field(default_factory=dict)  # what each hook noted in this run
    now: Pass = field(default_factory=lambda: Pass(-1))

    def __call__(self, *_: Any) -> None:
        """A run is kept on the frame of the pipeline's call as its trace function: Python's only place for something
        that lives as long as a frame. It traces nothing."""

    def place(self, scheduler: Any, timestep: Tensor, steps: int | None) -> tuple[int, int, int]:
        """(pass, step, steps of the pass) of a call; pass and step from 0.

        scheduler: of the pipeline that is running, or None.  timestep: any shape; per-token and per-frame timesteps
        count by their mean.  steps: length of a pass, used where the scheduler is not the one that steps.
        """
        noise = noise_of(timestep)
        schedule = getattr(scheduler, "timesteps", None)
        if self.now.number < 0 or schedule is not self.now.schedule:
            self.now = Pass(self.now.number + 1, schedule)
        index = None if schedule is None else _index(scheduler, schedule, noise, self.now)
        if (index is None and self.now.turns_back(noise)) or (index is not None and index < self.now.index):
            self.now = Pass(self.now.number + 1, schedule)
        now = self.now
        now.see(noise)
        if index is None or schedule is None:
            length = steps or (0 if schedule is None else len(schedule))
            return now.number, now.distinct, max(length, now.distinct + 1)
        now.index = index
        order = getattr(scheduler, "order", 1)
        return now.number, index // order, max(1, -((now.start - len(schedule)) // order))


def noise_of(timestep: Tensor) -> float:
    return float(timestep.detach().cpu().double().mean())


def _index(scheduler: Any, schedule: Tensor, noise: float, now: Pass) -> int | None:
    """How many entries of its schedule a scheduler has gone since the pass began, None if it does not tell."""
    if hasattr(scheduler, "step_index"):
        at = scheduler.step_index
        if at is not None:
            if now.first is None:
                # Where it began it tells after its first step only, and not always where the pipeline began.
                now.first = at - 1 if now.last is not None else now.start
            return int(at - now.first)
        if now.last not in (None, noise):  # it would have stepped: the pipeline steps copies of it
            return None
        begin = scheduler.begin_index
        # No run begins where a schedule ends, at zero, and one that is told upwards (to Z-Image) begins with zero.
        found = [begin] if begin is not None else _where(schedule, noise) if noise else []
    else:
        found = _where(schedule, noise)
        if not found:
            return None
    if now.last is None:
        now.start = int(found[0]) if found else 0
    return 0 if hasattr(scheduler, "step_index") else int(found[0]) - now.start


def _where(schedule: Tensor, noise: float) -> list[int]:
    return (schedule.detach().cpu().double() == noise).nonzero().flatten().tolist()
