"""Answers to a workload, by method: scores, paired differences from plain decoding, and a verdict or why there is none.

A lossless method is judged by its tokens. A lossy one by the headline figure of the workload, case by case beside plain
decoding. What plain decoding itself scores must lie above what the right answers to *other* cases would score: else it
answers without having read, and that a lossy method loses nothing would be no evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from draftdiff.compare.paired import Interval, mean_interval
from draftdiff.errors import UserError
from draftdiff.llm.workloads.base import Case, Score, Workload

LEAST_CASES = 2


@dataclass
class Judgement:
    """scores: by method, plain decoding among them, one for each case."""

    workload: Workload
    cases: Sequence[Case]
    scores: dict[str, list[Score]]

    @classmethod
    def of(cls, workload: Workload, cases: Sequence[Case], texts: dict[str, list[str]]) -> Judgement:
        """Score what each method wrote. texts: by method, one for each case."""
        scored = {name: [workload.score(case, text) for case, text in zip(cases, said)] for name, said in texts.items()}
        return cls(workload, cases, scored)

    def values(self, name: str, metric: str | None = None) -> list[float | None]:
        metric = metric or self.workload.headline
        return [score[metric] for score in self.scores[name]]

    def mean(self, name: str) -> float:
        return fmean(value for value in self.values(name) if value is not None)

    def difference(self, name: str, metric: str | None = None) -> Interval | None:
        """Of a method from plain decoding; None where no case has both."""
        pairs = zip(self.values(name, metric), self.values("plain", metric))
        known = [own - plain for own, plain in pairs if own is not None and plain is not None]
        return mean_interval(known) if known else None

    @property
    def floor(self) -> float:
        """What the right answers to the next case score on average."""
        return fmean(self._floors())

    def _floors(self) -> list[float]:
        following = [*self.cases[1:], self.cases[0]]
        scored = [self.workload.score(case, other.gold) for case, other in zip(self.cases, following)]
        return [score[self.workload.headline] or 0.0 for score in scored]

    def refusal(self) -> str | None:
        """Why lossy methods cannot be judged, in one line; None if they can."""
        above = mean_interval([(own or 0.0) - floor for own, floor in zip(self.values("plain"), self._floors())])
        if above.low > 0:
            return None
        return (
            f"no verdict on lossy methods: plain decoding scores {self.mean('plain'):.1f} in {self.workload.headline}, "
            f"right answers to other cases {self.floor:.1f}"
        )

    def verdict(self, name: str) -> str:
        """worse, better, or that no difference was shown."""
        found = self.difference(name)
        if found is None or self.refusal() is not None:
            return "refused"
        return "worse" if found.high < 0 else "better" if found.low > 0 else "no difference shown"

    def content(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {
            "name": self.workload.name,
            "cases": len(self.cases),
            "headline": self.workload.headline,
            "interval": "95 % percentile bootstrap of the paired differences, 10,000 resamples of the cases",
            "floor": self.floor,
            "refusal": self.refusal(),
            "methods": {
                name: {
                    "summary": self.workload.summary(self.cases, scores),
                    "differences": {
                        metric: vars(found)
                        for metric in self.workload.metrics
                        if name != "plain" and (found := self.difference(name, metric)) is not None
                    },
                    "scores": scores,
                }
                for name, scores in self.scores.items()
            },
        }


def checked_cases(workload: Workload, seed: int, n: int) -> list[Case]:
    """Cases for a comparison. Raises UserError for fewer than two, of which no interval can be had."""
    if n < LEAST_CASES:
        raise UserError(f"cases must be at least {LEAST_CASES}, got {n}")
    return workload.cases(seed, n)
