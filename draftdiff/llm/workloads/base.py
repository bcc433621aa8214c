"""What a workload is: seeded cases, a score of an answer by rule, and a summary of many scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

Score = dict[str, float | None]


@dataclass(frozen=True)
class Case:
    """prompt: what the model reads.  gold: an answer that scores full marks.  truth: what the scorer knows."""

    prompt: str
    gold: str
    truth: Any = field(repr=False)


class Workload(ABC):
    """A kind of task with a score that no model computes.

    name: on the command line.  headline: the key of `score` by which answers are judged.  metrics: what each key of
    `score` means, for people.  tokens: new tokens that gold answers need at most, with a tokenizer of the usual size.
    """

    name: ClassVar[str]
    headline: ClassVar[str]
    metrics: ClassVar[dict[str, str]]
    tokens: int

    @abstractmethod
    def cases(self, seed: int, n: int) -> list[Case]:
        """The same n cases for the same seed, of which the first are those of a smaller n."""

    @abstractmethod
    def score(self, case: Case, text: str) -> Score:
        """Figures of an answer, by the keys of `metrics`: numbers from 0 to 100, None where nothing is asked."""

    @abstractmethod
    def summary(self, cases: Sequence[Case], scores: Sequence[Score]) -> dict[str, float]:
        """Figures of all answers together."""
