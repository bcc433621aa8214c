"""Which denoising step a transformer call belongs to, told from the timesteps it is given."""

from __future__ import annotations

from torch import Tensor


class Progress:
    """Counts distinct timesteps of a run; shared by the transformers of a pipeline, which take turns in one schedule.

    Calls of one step (CFG branches) bring the same timestep. Within a run noise moves one way, so a move back is a new
    run: also after a run that was broken off.
    """

    def __init__(self) -> None:
        self.run = 0
        self.reset()

    def reset(self) -> None:
        """The next timestep starts a new run."""
        self.step = -1
        self._last: float | None = None
        self._direction = 0

    def observe(self, timestep: Tensor) -> int:
        """The 0-based step of a call. timestep: any shape; per-token and per-frame timesteps count by their mean."""
        noise = float(timestep.double().mean())
        if self._last is not None and noise != self._last:
            direction = 1 if noise > self._last else -1
            if direction == -self._direction:
                self.reset()
            else:
                self._direction = direction
        if self._last is None:
            self.run += 1
        if noise != self._last:
            self.step += 1
        self._last = noise
        return self.step
