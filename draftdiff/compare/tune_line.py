"""The line that is searched: where any amount of work does most, by recorded errors and what they mean in a video."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import geometric_mean

import torch
from torch import Tensor

from draftdiff.compare.metrics import psnr
from draftdiff.compare.video_run import Run
from draftdiff.core.allocation import Allocation, allocations, finer
from draftdiff.core.budget import Budget
from draftdiff.video.config import DraftAttentionConfig
from draftdiff.video.sensitivity import Sensitivity

_BANDS = 6  # of layers whose weight is learnt together
_PROBED = 2  # rung of the ladder at which weights are learnt


def bands_of(layers: int) -> list[range]:
    """Layers in at most so many neighbouring groups. The first is by itself: all others read what it gets wrong, and a
    small error there counts many times one of the second."""
    count = min(_BANDS, layers) - 1
    return [
        range(1),
        *(range(1 + (layers - 1) * i // count, 1 + (layers - 1) * (i + 1) // count) for i in range(count)),
    ]


class Line:
    """Allocations from the least work to dense attention, each the best of its work by what was recorded and learnt.

    of_steps, of_layers: what a squared error there counts, float64 [stretches] and [layers].
    """

    def __init__(self, found: Sensitivity, base: DraftAttentionConfig, stretches: int) -> None:
        self.found, self.base = found, base
        self.loss = found.loss(stretches)
        self.costs, self.dense = found.costs()
        self.ladder = torch.tensor(found.ladder, dtype=torch.float64)
        self.of_steps = torch.ones(stretches, dtype=torch.float64)
        self.of_layers = torch.ones(found.layers, dtype=torch.float64)

    def config(self, density: Tensor, single: float) -> DraftAttentionConfig:
        """The base at these densities, float64 [stretches, layers, heads]; layers of 1 throughout are exact."""
        faster = self.dense <= self.costs[:, -1].min()
        return replace(
            self.base,
            sparsity=Budget(0.0, heads=tuple(tuple(map(tuple, rows)) for rows in density.tolist())),
            tokens=single,
            dense_steps=0,
            dense_end=0,
            dense_layers=0,
            dense_above=1.0 if faster else None,
        )

    def learn(
        self, render: Callable[[DraftAttentionConfig], list[Run]], dense: list[Run], bands: list[range]
    ) -> list[tuple[float, list[Run]]]:
        """Weights of steps and layers, from renders in which a stretch of steps or a band of layers is sparse alone.

        render: of the first prompts.  dense: runs of all.  Returns those renders, each with its squared distance from
        the dense ones, the geometric mean of the prompts, which is what a loss now counts in.
        """
        seen = []
        local = self.loss[-1, _PROBED]  # [stretches, layers, heads]
        for place in range(len(self.of_steps)):
            density = torch.ones_like(local)
            density[place] = self.ladder[_PROBED]
            seen.append(self._probe(render, density, dense))
            self.of_steps[place] = seen[-1][0] / local[place].sum().clamp(min=1e-30)
        weighed = (local * self.of_steps[:, None, None]).sum((0, 2))
        for band in bands:
            density = torch.ones_like(local)
            density[:, list(band)] = self.ladder[_PROBED]
            seen.append(self._probe(render, density, dense))
            self.of_layers[list(band)] = seen[-1][0] / weighed[list(band)].sum().clamp(min=1e-30)
        return seen

    def _probe(
        self, render: Callable[[DraftAttentionConfig], list[Run]], density: Tensor, dense: list[Run]
    ) -> tuple[float, list[Run]]:
        runs = render(replace(self.config(density, self.found.tokens[-1]), dense_above=1.0))
        return geometric_mean([_squared_distance(*pair) for pair in zip(runs, dense)]), runs

    def points(self) -> list[Allocation]:
        """From the least work up; the last is dense where nothing else is exact."""
        loss = self.loss * self.of_steps[:, None, None] * self.of_layers[:, None]
        return allocations(*finer(self.ladder, loss, self.costs), self.dense, self.found.tokens)


def _squared_distance(run: Run, dense: Run) -> float:
    """Of what is seen: much that late steps change in the latents is not."""
    return 10 ** (-psnr(run.frames, dense.frames) / 10)
