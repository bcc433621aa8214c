"""Does the draft map pay at the last scales of VAR and Infinity? Their attention, dense and block-sparse, side by side.

A token of the current scale reads the cached history wholly and of its own scale what the draft map chooses
(`draftdiff.var.last_scales`). Draft, selection and the change of layout are in the times. A density of 1 shows what of
the gain is the kernel's: it keeps everything, and must give dense attention, which is checked. "At most" is what the
skipped products alone could gain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from draftdiff.bench.runner import Routine, in_turns, ratios, warmed
from draftdiff.compare.metrics import relative_l2
from draftdiff.compare.table import Column, spread, text_table, with_spread
from draftdiff.compare.timing import amdahl
from draftdiff.var.last_scales import attend_scale

COLUMNS: tuple[Column, ...] = (
    ("scale", "scale", str, ""),
    ("history", "history", str, ""),
    ("kept", "density", "{:.0%}".format, ""),
    ("dense", "dense_seconds", with_spread(" s", 4), ""),
    ("sparse", "sparse_seconds", with_spread(" s", 4), ""),
    ("speed-up", "speedup", with_spread("x", 2), ""),
    ("at most", "limit", "{:.2f}x".format, ""),
    ("scale's speed-up", "scale_speedup", "{:.2f}x".format, ""),
)


@dataclass(frozen=True)
class Case:
    """side: of the current scale.  history: tokens of all earlier ones.  linear: operations per token and layer outside
    self-attention, over the width."""

    model: str
    side: int
    history: int
    head_dim: int
    width: int
    linear: int

    def attention_share(self, history: int) -> float:
        """Of a scale's operations."""
        attention = 4 * (history + self.side**2)
        return attention / (attention + self.linear * self.width)


# Projections are 8, the feed-forward 16 times width squared; Infinity's attention to the prompt has another 4.
CASES = (
    Case("VAR-d36 512px", 24, 640, 64, 2304, 24),
    Case("VAR-d36 512px", 32, 1216, 64, 2304, 24),
    Case("Infinity-2B 1M", 48, 4121, 128, 2048, 28),
    Case("Infinity-2B 1M", 64, 6425, 128, 2048, 28),
)


TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Row:
    """limit: speed-up by the skipped products alone.  scale_speedup: of the whole scale, by Amdahl's law."""

    model: str
    scale: str
    history: int
    density: float
    dense_seconds: dict[str, float]
    sparse_seconds: dict[str, float]
    speedup: dict[str, float]
    limit: float
    attention_share: float
    scale_speedup: float
    full_selection_relative_l2: float


class LastScales(Routine):
    name = "var attention"
    file = "{device}-var-attention"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    def cases(self) -> list[tuple[Case, int, float]]:
        cases = CASES[1::2] if self.options.last_only else CASES
        plan = product(cases, (1.0, self.options.budget), self.options.density)
        return [(case, round(case.history * share), density) for case, share, density in plan]

    def about(self) -> dict[str, Any]:
        return {"heads": self.options.heads, "batch": self.options.batch}

    def measure(self, case: tuple[Case, int, float]) -> list[dict[str, Any]]:
        """One row; so many tokens are left of the case's history."""
        scale, history, density = case
        generator = torch.Generator().manual_seed(0)
        shape = (self.options.batch, self.options.heads, history + scale.side**2, scale.head_dim)
        q, k, v = (torch.randn(shape, generator=generator).to(self.device, self.dtype) for _ in range(3))
        q, factor = q[:, :, history:].contiguous(), 1 / math.sqrt(scale.head_dim)

        def dense() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, scale=factor)

        def sparse(kept: float = density) -> Tensor:
            return attend_scale(q, k, v, (scale.side, scale.side), kept, factor)

        error = relative_l2(sparse(1.0), dense())
        makers = {"dense": warmed(dense, self.device), "sparse": warmed(sparse, self.device)}
        seconds, _ = in_turns(makers, self.options.rounds)
        speedup, share = spread(ratios(seconds["dense"], seconds["sparse"])), scale.attention_share(history)
        current = scale.side**2 / (history + scale.side**2)
        row = Row(
            model=scale.model,
            scale=f"{scale.model}, {scale.side}x{scale.side}",
            history=history,
            density=density,
            dense_seconds=spread(seconds["dense"]),
            sparse_seconds=spread(seconds["sparse"]),
            speedup=speedup,
            limit=1 / (1 - (1 - density) * current),
            attention_share=share,
            scale_speedup=amdahl(share, speedup["median"]),
            full_selection_relative_l2=error,
        )
        if not error <= TOLERANCE[self.dtype]:
            self.failures.append(f"{row.scale} differs from dense attention")
        return [asdict(row)]

    def table(self, payload: Mapping[str, Any]) -> Iterable[str]:
        return text_table(payload["rows"], COLUMNS)
