"""What a run of draft attention did, for people and for machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Forward:
    """One call of a transformer.

    step: 0-based.  branch: CFG branch if the pipeline names it.  layers: indices of the sparse layers.
    stats: fp32 [sparse layers, 2], density and drafted mass; negative where a cache skipped the layer.
    """

    step: int
    branch: str
    sparse: bool
    layers: list[int]
    stats: Tensor | None = None


@dataclass
class TransformerReport:
    """The last run of one transformer. seconds: by part, of all calls together."""

    transformer: str
    layers: list[str]
    grid: tuple[int, int, int] | None
    tile: tuple[int, int, int] | None
    block_size: int | None
    backend: str
    forwards: list[Forward]
    seconds: dict[str, float]

    @property
    def dense_steps(self) -> int:
        return len({f.step for f in self.forwards if not f.sparse})

    @property
    def sparse_steps(self) -> int:
        return len({f.step for f in self.forwards if f.sparse})

    def _matrix(self, column: int, dense: float) -> Tensor:
        """[steps, layers] mean over CFG branches; `dense` where a layer was dense, NaN where a cache skipped it."""
        steps = 1 + max((f.step for f in self.forwards), default=-1)
        total, calls = torch.zeros(steps, len(self.layers)), torch.zeros(steps, len(self.layers))
        for forward in self.forwards:
            values = torch.full((len(self.layers),), dense)
            if forward.stats is not None:
                values[forward.layers] = forward.stats[:, column]
            ran = values >= 0
            total[forward.step][ran] += values[ran]
            calls[forward.step][ran] += 1
        return total / calls

    @property
    def density(self) -> Tensor:
        """Share of token pairs computed, fp32 [steps, layers]: 1 where dense, NaN where a cache skipped the layer."""
        return self._matrix(0, dense=1.0)

    @property
    def missed_mass(self) -> Tensor:
        """Share of attention mass on skipped tiles, by the draft's estimate, fp32 [steps, layers]: 0 where dense."""
        return 1 - self._matrix(1, dense=1.0)

    def sparse_mean(self, column: int) -> float | None:
        """Mean of a column of the stats over all sparse calls, None if there were none."""
        values = [f.stats[:, column] for f in self.forwards if f.stats is not None]
        if not values:
            return None
        joined = torch.cat(values)
        joined = joined[joined >= 0]
        return float(joined.mean()) if len(joined) else None

    def to_dict(self) -> dict[str, Any]:
        kept = self.sparse_mean(1)
        return {
            "transformer": self.transformer,
            "layers": len(self.layers),
            "grid": self.grid,
            "tile": self.tile,
            "block_size": self.block_size,
            "backend": self.backend,
            "dense_steps": self.dense_steps,
            "sparse_steps": self.sparse_steps,
            "density": self.sparse_mean(0),
            "missed_mass": None if kept is None else 1 - kept,
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
            "density_by_step_and_layer": [
                [round(x, 4) if x == x else None for x in row] for row in self.density.tolist()
            ],
        }

    def __str__(self) -> str:
        grid, tile = ("x".join(map(str, sizes)) if sizes else "none" for sizes in (self.grid, self.tile))
        lines = [
            f"{self.transformer}: {self.sparse_steps} sparse and {self.dense_steps} dense steps, "
            f"grid {grid}, tiles {tile}, backend {self.backend}"
        ]
        density, kept = self.sparse_mean(0), self.sparse_mean(1)
        if density is not None and kept is not None:
            lines.append(f"  density {density:.3f} in sparse layers, missed mass {1 - kept:.3f} (draft's estimate)")
        elif self.forwards:
            lines.append("  no sparse call: too few tokens (min_tokens), or all steps or layers dense")
        else:
            lines.append("  no run yet")
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
