"""What a run of draft attention did, for people and for machines."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draftdiff.video.clock import Clock


@dataclass
class Forward:
    """One call of a transformer.

    passage: which way through a schedule this was (long-video pipelines take several in a run).  step: of the request.
    Both 0-based.  layers: indices of the sparse layers.  stats: fp32 [sparse layers, 2], density and drafted mass.
    ran: bool [sparse layers], False where a cache skipped the layer.
    """

    passage: int
    step: int
    layers: list[int] = field(default_factory=list)
    stats: Tensor | None = None
    ran: Tensor | None = None

    @property
    def sparse(self) -> bool:
        return bool(self.layers)


@dataclass(eq=False)
class Log:
    """What a hook notes in one run. reasons: how often something that might have been sparse was dense, and why."""

    clock: Clock = field(default_factory=lambda: Clock(torch.device("cpu")))
    forwards: list[Forward] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    grid: tuple[int, int, int] | None = None
    tile: tuple[int, int, int] | None = None
    block_size: int | None = None
    selection: str = ""
    tokens: int = 0
    backend: str = ""
    groups: int = 1


@dataclass
class TransformerReport:
    """The last run of one transformer, all passes of a pipeline call together. tokens: single ones that each query tile
    reads.  groups: the most of keys that a mask adds a number each to.  seconds: by part, of all calls."""

    transformer: str
    layers: list[str]
    grid: tuple[int, int, int] | None
    tile: tuple[int, int, int] | None
    block_size: int | None
    selection: str
    tokens: int
    backend: str
    groups: int
    forwards: list[Forward]
    reasons: dict[str, int]
    seconds: dict[str, float]

    @classmethod
    def of(cls, transformer: str, layers: list[str], log: Log) -> TransformerReport:
        return cls(
            transformer,
            layers,
            log.grid,
            log.tile,
            log.block_size,
            log.selection,
            log.tokens,
            log.backend,
            log.groups,
            forwards=list(log.forwards),
            reasons=dict(log.reasons),
            seconds=log.clock.seconds(),
        )

    @property
    def passes(self) -> int:
        return len({f.passage for f in self.forwards})

    @property
    def dense_steps(self) -> int:
        """Steps without a sparse call, over all passes."""
        return len(self._steps()) - self.sparse_steps

    @property
    def sparse_steps(self) -> int:
        return len({(f.passage, f.step) for f in self.forwards if f.sparse})

    def _steps(self) -> list[tuple[int, int]]:
        return sorted({(f.passage, f.step) for f in self.forwards})

    def _matrix(self, column: int, dense: float) -> Tensor:
        """[steps, layers] mean over a step's calls; `dense` where a layer was dense, NaN where a cache skipped it."""
        rows = {step: row for row, step in enumerate(self._steps())}
        total, calls = torch.zeros(2, len(rows), len(self.layers))
        for forward in self.forwards:
            values, ran = torch.full((len(self.layers),), dense), torch.ones(len(self.layers), dtype=torch.bool)
            if forward.stats is not None and forward.ran is not None:
                values[forward.layers], ran[forward.layers] = forward.stats[:, column], forward.ran
            row = rows[forward.passage, forward.step]
            total[row][ran] += values[ran]
            calls[row][ran] += 1
        return total / calls

    @property
    def density(self) -> Tensor:
        """Share of token pairs computed, fp32 [steps, layers]: 1 where dense, NaN where a cache skipped the layer."""
        return self._matrix(0, dense=1.0)

    @property
    def missed_mass(self) -> Tensor:
        """Share of attention mass on skipped tiles, by the draft's estimate, fp32 [steps, layers]: 0 where dense."""
        return 1 - self._matrix(1, dense=1.0)

    def _mean(self, column: int) -> float | None:
        values = [f.stats[f.ran, column] for f in self.forwards if f.stats is not None and f.ran is not None]
        joined = torch.cat(values) if values else torch.empty(0)
        return float(joined.mean()) if len(joined) else None

    @property
    def mean_density(self) -> float | None:
        """Share of token pairs computed, over all sparse calls; None if there were none."""
        return self._mean(0)

    @property
    def mean_missed_mass(self) -> float | None:
        """Share of attention mass on skipped tiles, by the draft's estimate, over all sparse calls."""
        kept = self._mean(1)
        return None if kept is None else 1 - kept

    def to_dict(self) -> dict[str, Any]:
        return {
            "transformer": self.transformer,
            "layers": len(self.layers),
            "grid": self.grid,
            "tile": self.tile,
            "block_size": self.block_size,
            "selection": self.selection,
            "tokens": self.tokens,
            "backend": self.backend,
            "key_groups": self.groups,
            "passes": self.passes,
            "dense_steps": self.dense_steps,
            "sparse_steps": self.sparse_steps,
            "density": self.mean_density,
            "missed_mass": self.mean_missed_mass,
            "dense_because": self.reasons,
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
            "density_by_step_and_layer": [
                [round(x, 4) if x == x else None for x in row] for row in self.density.tolist()
            ],
        }

    def __str__(self) -> str:
        grid, tile = ("x".join(map(str, sizes)) if sizes else "none" for sizes in (self.grid, self.tile))
        passes = f" in {self.passes} passes" if self.passes > 1 else ""
        lines = [
            f"{self.transformer}: {self.sparse_steps} sparse and {self.dense_steps} dense steps{passes}, "
            f"grid {grid}, tiles {tile}, backend {self.backend or 'none'}"
        ]
        if self.selection:
            besides = f" and {self.tokens} single tokens" if self.tokens else ""
            lines.append(f"  each query tile reads tiles by {self.selection!r}{besides} exactly")
        if self.groups > 1:
            lines.append(f"  the mask adds a number to each of {self.groups} groups of keys, as for dense attention")
        if self.mean_density is not None and self.mean_missed_mass is not None:
            mass = f"missed mass {self.mean_missed_mass:.3f} (draft's estimate)"
            lines.append(f"  density {self.mean_density:.3f} in sparse layers, {mass}")
        elif self.forwards and not self.reasons:
            lines.append("  no sparse call: all steps or layers are dense")
        elif not self.forwards and not self.reasons:
            lines.append("  no run yet")
        lines += [f"  dense, {count} times: {reason}" for reason, count in self.reasons.items()]
        for name, value in sorted(self.seconds.items(), key=lambda item: -item[1]):
            lines.append(f"  {name:<16} {value:8.2f} s")
        return "\n".join(lines)


@dataclass
class Report:
    """`draftdiff.report(pipe)`: one part per transformer."""

    transformers: list[TransformerReport]

    def to_dict(self) -> dict[str, Any]:
        return {"transformers": [t.to_dict() for t in self.transformers]}

    def __str__(self) -> str:
        return "\n".join(map(str, self.transformers))
