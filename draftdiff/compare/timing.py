"""Where the time of a call goes, and what it would gain if a part of it were faster (Amdahl's law)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Parts that the clocks of `draftdiff.report` tell of a transformer's video self-attentions.
ATTENTION_PARTS = ("draft", "select", "kernel", "dense attention")


@dataclass
class Timing:
    """One call of the whole pipeline, in seconds. parts: of the transformers' calls; empty where nothing is clocked."""

    seconds: float
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def attention(self) -> float:
        """Seconds of the video self-attentions."""
        return sum(self.parts.get(part, 0.0) for part in ATTENTION_PARTS)

    def breakdown(self) -> dict[str, float]:
        return breakdown(self.seconds, self.parts)


def breakdown(seconds: float, parts: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a call by what they were spent on; adds up to the whole call.

    seconds: of the call.  parts: seconds by the names of `draftdiff.report`, of all transformers together.
    """
    transformer = parts.get("dense forward", 0.0) + parts.get("sparse forward", 0.0)
    split = {part: parts.get(part, 0.0) for part in ATTENTION_PARTS}
    rest = {"rest of transformer": transformer - sum(split.values()), "rest of pipeline": seconds - transformer}
    return split | {part: max(0.0, value) for part, value in rest.items()}


def amdahl(share: float, speedup: float) -> float:
    """Speed-up of a whole of which a share, in [0, 1], becomes so many times as fast; inf: takes no time."""
    return 1 / (1 - share + share / speedup)
