"""One attention call of another program: where the video stands in it, and draft attention over it."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from draftdiff.attention.attend import attend, attend_op, compute_dtype, needs_gradient, packed_places
from draftdiff.core.devices import exact_dtype
from draftdiff.core.grid import LatentGrid
from draftdiff.kernels.block_sparse import resolve
from draftdiff.kernels.crossover import dense_wins_above
from draftdiff.video.config import DraftAttentionConfig

logger = logging.getLogger("draftdiff")

MIN_TOKENS = 4096  # a server's default: below it a GPU gains nothing


@dataclass(frozen=True)
class Places:
    """A grid behind `lead` other tokens, and further grids, each with the position of its first token."""

    grid: LatentGrid
    lead: int = 0
    others: tuple[tuple[int, LatentGrid], ...] = ()

    @property
    def tokens(self) -> int:
        """Of all grids."""
        return self.grid.tokens + sum(grid.tokens for _, grid in self.others)

    def gaps(self, tokens: int) -> list[tuple[int, int]]:
        """Stretches (start, stop) of a sequence of so many tokens that are in no grid."""
        grids = sorted([(self.lead, self.grid), *self.others], key=lambda part: part[0])
        edges = [0, *(edge for start, grid in grids for edge in (start, start + grid.tokens)), tokens]
        return list(zip(edges[::2], edges[1::2]))


@dataclass(frozen=True)
class Done:
    """out: like q.  stats: fp32 [2], density and the mass that the draft gives to what was kept.  backend: what ran."""

    out: Tensor
    stats: Tensor
    backend: str


def why_dense(q: Tensor, k: Tensor, v: Tensor, config: DraftAttentionConfig, places: Places) -> str | None:
    """What speaks against a sparse call, before its mask is looked at: queries, keys and values
    [batch, tokens, heads, head_dim]. None if nothing does."""
    if places.tokens < (config.min_tokens or 0):
        return f"{places.tokens} video tokens are fewer than min_tokens, here {config.min_tokens}"
    if k.shape != v.shape or len({x.dtype for x in (q, k, v)}) > 1 or q.shape[2] % k.shape[2]:
        return "queries, keys and values of different kinds"
    return None


def sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: DraftAttentionConfig,
    places: Places,
    *,
    flags: Tensor | None = None,
    scale: float | None = None,
) -> Done | str:
    """Draft attention of a call, or why dense attention is the better one.

    q, k, v: [batch, tokens, heads, head_dim], k and v perhaps with fewer heads.  flags: bool [batch, tokens in no
    grid], False for padding.  scale: of the scores, 1/sqrt(head_dim) if None.
    Raises ValueError for shapes that do not fit the places.
    """
    density = 1 - config.budget.sparsity
    backend = resolve(config.backend, q.device, compute_dtype(q), q.shape[3], config.precision)
    limit = dense_wins_above(backend, q.device.type) if config.dense_above is None else config.dense_above
    if config.selection != "full" and density >= limit:
        return f"dense attention is the faster one at density {density:g} with the backend {backend}"
    shares = torch.full((q.shape[2],), density, dtype=exact_dtype(q.device), device=q.device)
    if needs_gradient(q, k, v):
        packed = packed_places(places.grid.shape, places.lead, [(at, grid.shape) for at, grid in places.others])
        out, stats = attend_op(q, k, v, shares, flags, packed, scale, config.rule.packed)
    else:
        where: dict[str, Any] = {"grid": places.grid, "lead": places.lead, "others": places.others}
        out, stats = attend(q, k, v, shares, config.rule, **where, text_mask=flags, scale=scale)
    return Done(out, stats, backend)


def unmasked(
    q: Tensor, k: Tensor, v: Tensor, config: DraftAttentionConfig, places: Places, scale: float
) -> Tensor | str:
    """The output of a call without a mask, as `sparse` takes it, or why it is to be dense."""
    if (reason := why_dense(q, k, v, config, places)) is not None:
        return reason
    done = sparse(q, k, v, config, places, scale=scale)
    return done if isinstance(done, str) else done.out


def layer_of(name: str) -> int | None:
    """The number of the block that a module's dotted name tells, its first."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


@lru_cache(maxsize=256)
def say_once(text: str) -> None:
    """One line in the server's log, the first time."""
    logger.warning("draftdiff: %s", text)
