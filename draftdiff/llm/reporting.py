"""What a speculative generation did: tokens per target forward, where drafts were accepted, and where the time went."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from draftdiff.errors import UserError
from draftdiff.llm.metrics import mbsu

if TYPE_CHECKING:
    from draftdiff.llm.drafters.base import Drafter


@dataclass
class Report:
    """Of one call of `generate`, over all rows of its batch.

    rounds: rounds of each row, added.  tokens: emitted.  drafted: nodes proposed.  tried, accepted: how often a node at
    depth 1, 2, ... was there to be accepted, and how often one was.  target_forwards: with `replays` among them, which
    bring models with recurrent states back to what was accepted.  pauses: rounds without drafts, as they would not have
    paid.  level_cost: what one more level of drafts took, in rounds without any; None if not measured.  rest, wait:
    such rounds until drafts are tried again, and how many will follow if that fails, too.  seconds: of the whole call,
    its drafting and its target forwards; prompt: those of the prompt in both models, part of the whole. A GPU's work
    counts where its result is waited for.
    """

    rounds: int = 0
    tokens: int = 0
    drafted: int = 0
    target_forwards: int = 0
    replays: int = 0
    draft_forwards: int = 0
    cost: float = 0.0
    pauses: int = 0
    level_cost: float | None = None
    rest: int = 0
    wait: int = 0
    tried: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    seconds: float = 0.0
    prompt_seconds: float = 0.0
    draft_seconds: float = 0.0
    target_seconds: float = 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Block efficiency tau: tokens that a row gained per target forward."""
        rounds = self.target_forwards - self.replays
        return self.tokens / max(self.rounds, 1) * rounds / max(self.target_forwards, 1)

    @property
    def acceptance(self) -> list[float]:
        """Share of the tried nodes that were accepted, by depth."""
        return [a / t for a, t in zip(self.accepted, self.tried) if t]

    @property
    def mbsu(self) -> float:
        """The speed-up that memory traffic alone predicts, with the draft forwards of a round one after the other."""
        return mbsu(self.tokens_per_forward, self.cost, self.draft_forwards / max(self.target_forwards, 1))

    @property
    def overhead(self) -> float:
        """Seconds per round for all but drafting and the target's forwards, whose masks count as theirs."""
        spent = self.seconds - self.prompt_seconds - self.draft_seconds - self.target_seconds
        return spent / max(self.target_forwards, 1)

    def count(self, depth: int, accepted: int) -> None:
        """Add a round in which a path of `accepted` nodes was accepted of a tree of this depth."""
        missing = max(depth - len(self.tried), 0)
        self.tried += [0] * missing
        self.accepted += [0] * missing
        for level in range(min(depth, accepted + 1)):
            self.tried[level] += 1
            self.accepted[level] += level < accepted

    def to_dict(self) -> dict[str, Any]:
        """All fields and what follows from them."""
        derived = ("tokens_per_forward", "acceptance", "mbsu", "overhead")
        return asdict(self) | {name: getattr(self, name) for name in derived}

    def __str__(self) -> str:
        each = "each" if self.rounds <= self.target_forwards else "each and row"
        paused = f", {self.pauses} rounds without" if self.pauses else ""
        by_depth = " ".join(f"{share:.2f}" for share in self.acceptance) or "none drafted"
        return (
            f"{self.tokens} tokens in {self.target_forwards} target forwards: {self.tokens_per_forward:.2f} {each}; "
            f"{self.draft_forwards} draft forwards, {self.drafted} drafted{paused}\n"
            f"accepted by depth: {by_depth}\n"
            f"{self.seconds:.2f} s: prompt {self.prompt_seconds:.2f}, drafts {self.draft_seconds:.2f}, target "
            f"{self.target_seconds:.2f}; {1e3 * self.overhead:.2f} ms a round for the rest; "
            f"by memory traffic {self.mbsu:.2f}x over plain decoding"
        )


def report(drafter: Drafter) -> Report:
    """What the last generation with this drafter did. Raises ValueError if there was none."""
    if drafter.last_report is None:
        raise UserError(f"{type(drafter).__name__} has not been used in a generation yet")
    return drafter.last_report
