"""Where work does most: a density for every stretch of steps, layer and head, from what each would lose.

A Lagrangian: at a price of work every head takes the density of its least loss plus priced work, and no other densities
of as much work in all lose less. Going through the prices gives a line from the least work to the least loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_PRICES = 256
_PARTS = 4  # that each step of a ladder is cut into
_RANGE = 1e12  # of prices: below, what is left to lose is rounding


@dataclass(frozen=True)
class Allocation:
    """density: kept share, float64 [stretches, layers, heads]; layers left to dense attention have 1 throughout.
    work: time of the attention over that of all dense.  loss: in all.  single: share of all keys read singly."""

    density: Tensor
    work: float
    loss: float
    single: float


def finer(ladder: Tensor, loss: Tensor, cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with more rungs, between those that were recorded; shapes as for `allocations`, densities rising.

    Time runs straight between two of them, and so does the length of an error, nearly: the root of a loss.
    """
    place = torch.linspace(0, len(ladder) - 1, _PARTS * (len(ladder) - 1) + 1, dtype=torch.float64)
    below = place.long().clamp(max=len(ladder) - 2)
    share = place - below

    def between(x: Tensor, rungs: int) -> Tensor:
        low, high = (x.index_select(rungs, at) for at in (below, below + 1))
        return low + (high - low) * share.view(-1, *[1] * (x.ndim - 1 - rungs))

    return between(ladder, 0), between(loss.sqrt(), 1).square(), between(cost, 1)


def allocations(
    ladder: Tensor, loss: Tensor, cost: Tensor, dense: float, singles: tuple[float, ...]
) -> list[Allocation]:
    """The allocations that no other beats in both work and loss, from the least work up.

    ladder: densities to choose from, float64 [rungs].  loss: float64 [singles, rungs, stretches, layers, heads].
    cost: time of a layer's call in which all heads have a density, float64 [singles, rungs].  dense: of its dense
    attention, which loses nothing.  singles: shares of all keys that are read singly, one for all heads.
    """
    highest = math.log(max(loss.max().item(), 1e-300) / (dense * 1e-6))
    prices = torch.linspace(highest, highest - math.log(_RANGE), _PRICES, dtype=torch.float64).exp().tolist()
    found = [
        _at(ladder, of_tokens, times, dense, price, single)
        for of_tokens, times, single in zip(loss, cost, singles)
        for price in prices
    ]
    line: list[Allocation] = []
    for one in sorted(found, key=lambda one: (one.work, one.loss)):
        if not line or one.loss < line[-1].loss:
            line.append(one)
    return line


def _at(ladder: Tensor, loss: Tensor, cost: Tensor, dense: float, price: float, single: float) -> Allocation:
    heads = loss.shape[-1]
    total, rung = (loss + price * cost[:, None, None, None] / heads).min(0)
    is_dense = total.sum(-1) >= price * dense
    density = torch.where(is_dense[..., None], 1.0, ladder[rung])
    spent = torch.where(is_dense, dense, cost[rung].mean(-1))
    lost = loss.gather(0, rung[None])[0].sum(-1).masked_fill(is_dense, 0.0)
    return Allocation(density, (spent.mean() / dense).item(), lost.sum().item(), single)
