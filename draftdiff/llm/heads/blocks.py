"""The residual block that Medusa (arXiv 2401.10774) and Hydra (arXiv 2402.05109) heads are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """residual(x) + SiLU(linear(x)), from [..., given] to [..., width].

    residual is the identity where the widths are equal, else a linear map that begins by letting the first `width`
    numbers through; linear begins as zero. rank: of what both learn, None for full maps.
    """

    def __init__(self, given: int, width: int, rank: int | None = None) -> None:
        super().__init__()
        self.linear: nn.Module = nn.Linear(given, width) if rank is None else LowRank(given, width, rank)
        self.residual: nn.Module = nn.Identity()
        if given != width:
            self.residual = nn.Linear(given, width) if rank is None else LowRank(given, width, rank, through=True)
        with torch.no_grad():
            if isinstance(self.linear, nn.Linear):
                self.linear.weight.zero_()
                self.linear.bias.zero_()
            if isinstance(self.residual, nn.Linear):
                nn.init.eye_(self.residual.weight)
                self.residual.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + F.silu(self.linear(x))


class LowRank(nn.Module):
    """A linear map of low rank that begins as zero. through: added to the first `width` numbers of what it is given."""

    def __init__(self, given: int, width: int, rank: int, *, through: bool = False) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(given, rank, bias=False), nn.Linear(rank, width)
        self.width, self.through = width, through
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        learned = self.up(self.down(x))
        return x[..., : self.width] + learned if self.through else learned
