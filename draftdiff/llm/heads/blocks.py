"""The residual block that Medusa (arXiv 2401.10774) and Hydra (arXiv 2402.05109) heads are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """residual(x) + SiLU(linear(x)), from [..., given] to [..., width].

    residual is the identity where the widths are equal, else a linear map that begins by letting the first `width`
    numbers through. rank: of both maps, None for full; such maps are products of two, and begin as random ones.
    """

    def __init__(self, given: int, width: int, rank: int | None = None) -> None:
        super().__init__()
        self.linear = _linear(given, width, rank)
        nn.init.zeros_((self.linear if rank is None else self.linear[1]).weight)  # type: ignore[index, arg-type]
        self.residual = nn.Identity() if given == width else _linear(given, width, rank)
        if isinstance(self.residual, nn.Linear):
            with torch.no_grad():
                nn.init.eye_(self.residual.weight)
                nn.init.zeros_(self.residual.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + F.silu(self.linear(x))


def _linear(given: int, width: int, rank: int | None) -> nn.Module:
    if rank is None:
        return nn.Linear(given, width)
    return nn.Sequential(nn.Linear(given, rank, bias=False), nn.Linear(rank, width))
