"""What draft attention did in one run of a sampler, as text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from draftdiff.core.grid import LatentGrid


@dataclass
class Forward:
    """One call of a model at this sigma. stats: density and drafted mass, summed over its sparse attention calls."""

    sigma: float | None
    calls: int = 0
    stats: Tensor | None = None

    def add(self, stats: Tensor) -> None:
        self.calls += 1
        self.stats = stats if self.stats is None else self.stats + stats


@dataclass
class Log:
    """Notes of one run. reasons: how often what might have been sparse was not, and why."""

    forwards: list[Forward] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    grid: LatentGrid | None = None
    tile: tuple[int, int, int] | None = None
    backend: str = ""

    @property
    def steps(self) -> tuple[int, int]:
        """Sparse and dense steps: forwards at one sigma are one step."""
        sparse = {forward.sigma for forward in self.forwards if forward.calls}
        return len(sparse), len({forward.sigma for forward in self.forwards} - sparse)

    @property
    def means(self) -> tuple[float, float] | None:
        """Density and missed mass over all sparse calls, None if there were none."""
        found = [(forward.stats.cpu(), forward.calls) for forward in self.forwards if forward.stats is not None]
        if not found:
            return None
        density, mass = (torch.stack([stats for stats, _ in found]).sum(0) / sum(n for _, n in found)).tolist()
        return density, 1 - mass

    def __str__(self) -> str:
        if not self.forwards and not self.reasons:
            return "Draft Attention: no run yet"
        (sparse, dense), means = self.steps, self.means
        lines = [f"Draft Attention: {sparse} sparse and {dense} dense steps"]
        if means is not None:
            tile = "x".join(map(str, self.tile or ()))
            lines += [
                f"grid {self.grid}, tiles {tile}, backend {self.backend}",
                f"density {means[0]:.3f} in sparse layers, missed mass {means[1]:.3f} (draft's estimate)",
            ]
        elif not self.reasons:
            lines.append("no sparse call: all steps or layers are dense")
        return "\n".join(
            [*lines, *(f"not sparse, {count} times: {reason}" for reason, count in self.reasons.most_common())]
        )
