"""When to draft, and how deep: what a round is expected to bring over what it takes, with no draft among the choices.

What it brings follows from the shares accepted so far, by depth; what it takes from the clock or from a given cost.
Where nothing pays, rounds go without drafts and a trial follows after a while, later each time it fails. A drafter's
next generation begins where its last one ended, if the clock decides, on which the text does not hang. The rule of
length is that of arXiv 2211.17192, section 3.3, with what is measured in place of what is known.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from draftdiff.llm.checks import require
from draftdiff.llm.reporting import Report

_COSTS = ("auto", "clock", "bytes")
_DEEPEST = 16  # considered; it stands for any more
_ACCEPTED, _WEIGHT = 0.7, 2.0  # what is taken for granted before drafts were seen, and as how many of them it counts
_FADE, _FORGET = 0.97, 0.5  # what each round and each trial leave of what was seen, since text changes
_SHORTEST, _LONGEST = 8, 256  # rounds between trials
_TIMES = 9  # of rounds that are remembered; their median, because any of them may have been interrupted


@dataclass(frozen=True)
class Pace:
    """Drafts as deep as pays, none while they do not pay.

    cost: of one more level of drafts, in forwards of the target with one token. A number makes results depend on
    nothing but the seed; `report(drafter).level_cost` is what a generation measured. "clock" measures it; "bytes" takes
    the share of weights that the draft reads, as a memory-bound device would. "auto" is the clock where it cannot
    change the text (greedy decoding or drafts that are not sampled, in fp32 or fp64) and bytes elsewhere: sampled
    drafts of other lengths use other random numbers, and in half precision other shapes of a forward round otherwise.
    """

    cost: float | str = "auto"

    def __post_init__(self) -> None:
        known = self.cost in _COSTS if isinstance(self.cost, str) else 0 <= self.cost < math.inf
        require(known, f"cost must be a number from 0 on or one of {', '.join(_COSTS)}, got {self.cost!r}")


class Pacer:
    """The decisions of one generation. cost: of a level, None to measure it.  guess: of that, before.  whole: the
    drafter keeps to a length of its own, and can only be let or not.  earlier: what its last generation did; it counts
    where the cost is measured."""

    def __init__(self, cost: float | None, guess: float, *, whole: bool, earlier: Report | None = None) -> None:
        measured = cost is None
        self.pauses = 0  # rounds without drafts
        if whole:  # what it takes is its own affair too: it may draft beside the target, and only the clock can tell
            cost, guess = None if cost is None else 0.0, 0.0
        self._cost, self._guess, self._whole = cost, guess, whole
        self._reached, self._accepted = [0.0] * _DEEPEST, [0.0] * _DEEPEST  # by depth
        self._tokens = self._rounds = 0.0  # of rows in rounds with drafts
        self._seconds: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_TIMES))  # by depth, 0 without
        self._typical: dict[int, float] = {}  # medians of these
        self._rest, self._wait = 0, _SHORTEST
        self._trial = False
        self._paid = 0  # rounds in a row that were expected to pay
        self._depth = _DEEPEST
        if measured and earlier is not None and earlier.wait:
            self._rest, self._wait = earlier.rest, earlier.wait
            if not whole and earlier.level_cost is not None:
                self._guess = max(earlier.level_cost, 0.0)
            for known, counts in ((earlier.tried, self._reached), (earlier.accepted, self._accepted)):
                counts[: len(known)] = [_FORGET * count for count in known[:_DEEPEST]]

    def depth(self) -> int | float:
        """Most levels of drafts in the round to come."""
        if self._cost is None and 0 not in self._typical:
            self._depth = 0  # what a round without drafts takes has to be known first, and costs nothing to find out
        elif self._rest:
            self._rest -= 1
            self._depth = 0
            if not self._rest:
                self._trial = True
                self._forget()
        else:
            self._depth = self._choose()
        self.pauses += self._depth == 0
        return math.inf if self._depth == _DEEPEST else self._depth

    def saw(self, room: Sequence[int], accepted: Sequence[int], tokens: int, seconds: float) -> None:
        """What came of it. room: most levels that each row had room for.  accepted: of them, for each row.  tokens: new
        ones of all rows."""
        depth = min(self._depth, max(room))
        self._seconds[depth].append(seconds)
        self._typical[depth] = median(self._seconds[depth])
        if not depth:
            return
        for counts in (self._reached, self._accepted):
            counts[:] = [_FADE * count for count in counts]
        for most, taken in zip(room, accepted):
            for level in range(min(depth, most, taken + 1)):
                self._reached[level] += 1
                self._accepted[level] += level < taken
        self._tokens = _FADE * self._tokens + tokens
        self._rounds = _FADE * self._rounds + len(room)

    @property
    def level_cost(self) -> float | None:
        """Of one more level of drafts, as it was measured: in rounds without drafts; None if there were not both."""
        tried = [depth for depth in self._typical if depth]
        if not tried or 0 not in self._typical:
            return None
        depth = max(tried, key=lambda one: len(self._seconds[one]))
        return (self._typical[depth] / self._typical[0] - 1) / depth

    def tell(self, report: Report) -> None:
        """Write down what this generation learned, for its user and for the drafter's next one."""
        report.pauses, report.level_cost = self.pauses, self.level_cost
        report.rest, report.wait = self._rest, self._wait

    def _choose(self) -> int:
        depths = [_DEEPEST] if self._whole else range(1, _DEEPEST + 1)
        brought = self._brings()
        speed, best = max((brought[depth] / self._takes(depth), -depth) for depth in depths)
        self._paid = self._paid + 1 if speed * self._takes(0) > 1 else 0
        if self._paid >= _SHORTEST:
            self._wait = _SHORTEST
        if self._paid or self._trial:
            self._trial = False
            return -best
        self._rest, self._wait = self._wait, min(2 * self._wait, _LONGEST)
        return 0

    def _forget(self) -> None:
        for counts in (self._reached, self._accepted):
            counts[:] = [_FORGET * count for count in counts]
        self._tokens, self._rounds = _FORGET * self._tokens, _FORGET * self._rounds

    def _brings(self) -> list[float]:
        """Tokens that a row is expected to gain in a round of each depth."""
        share = (sum(self._accepted) + _WEIGHT * _ACCEPTED) / (sum(self._reached) + _WEIGHT)
        brought, chance = [1.0], 1.0
        for accepted, reached in zip(self._accepted, self._reached):
            chance *= (accepted + _WEIGHT * share) / (reached + _WEIGHT)
            brought.append(brought[-1] + chance)
        if self._whole:
            brought[-1] = (self._tokens + _WEIGHT * brought[-1]) / (self._rounds + _WEIGHT)
        return brought

    def _takes(self, depth: int) -> float:
        """What a round of this depth takes, in any unit."""
        if self._cost is not None:
            return 1 + depth * self._cost
        plain = self._typical[0]
        tried = [other for other in self._typical if other]
        if not depth or not tried:
            return plain * (1 + depth * self._guess)
        nearest = min(tried, key=lambda other: abs(other - depth))
        return plain + (self._typical[nearest] - plain) * depth / nearest
