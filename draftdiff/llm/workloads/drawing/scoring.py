"""The score of an answer: its operation chains beside those of the truth (after DrafterBench, arXiv 2507.11527).

An answer that could not run scores 0. One that could has 30 points and 70 times the mean of six ratios. Chains of
answer and truth are paired by likeness, the likest first; within a pair calls stand beside each other by what they give
(a file, marks, a mark, what is in it, a change). A result was handed on rightly if the call that gave it was right.
What the answer does beyond the truth is subtracted. The order of changes is not judged, nor how a picture would look.
Texts of reports are compared by difflib's ratio, not by a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import SequenceMatcher
from statistics import fmean
from typing import Any

from draftdiff.llm.workloads.drawing.calls import Call, Chain, NotExecutable, chains, parse
from draftdiff.llm.workloads.drawing.tools import Level

EXECUTABLE, ALIKE = 30.0, 0.9
VAGUE = object()  # a value that the instruction leaves open: any that is allowed is right


@dataclass
class Counts:
    """How much of what is due was done right: values, results handed on, calls with allowed values, tools, whole
    sequences of tools, whole chains."""

    arguments: float = 0.0
    variables: float = 0.0
    calls: float = 0.0
    tools: float = 0.0
    sequences: float = 0.0
    plans: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    @property
    def total(self) -> float:
        return sum(vars(self).values())


RATIOS = tuple(one.name for one in fields(Counts))


def score(truth: Sequence[Chain], text: str) -> dict[str, float | None]:
    """Points from 0 to 100, and the ratios in per cent; truth: chains whose open values are VAGUE."""
    try:
        found, idle = chains(parse(text))
    except NotExecutable:
        return {"score": 0.0, "executable": 0.0, **dict.fromkeys(RATIOS, 0.0)}
    due = sum((_due(chain) for chain in truth), Counts())
    done, spare = _paired(truth, found)
    surplus = sum((_due(chain) for chain in spare), Counts(calls=idle, tools=idle))
    ratios = {name: _ratio(*(getattr(one, name) for one in (done, surplus, due))) for name in RATIOS}
    points = EXECUTABLE + (100 - EXECUTABLE) * fmean(ratios.values())
    return {"score": points, "executable": 100.0, **{name: 100 * ratio for name, ratio in ratios.items()}}


def _ratio(done: float, surplus: float, due: float) -> float:
    """From 0 to 1; 1 where nothing is due and nothing was done."""
    return max(0.0, (done - surplus) / due) if due else float(surplus == 0)


def _due(chain: Chain) -> Counts:
    """Full marks of a chain."""
    return Counts(sum(len(call.literals) for call in chain), len(chain) - 1, len(chain), len(chain), 1, 1)


def _paired(truth: Sequence[Chain], found: Sequence[Chain]) -> tuple[Counts, list[Chain]]:
    """What of the truth was done, and the chains that are part of none of it."""
    marks = {(i, j): _beside(right, answer) for i, right in enumerate(truth) for j, answer in enumerate(found)}
    done, left = Counts(), set(range(len(found)))
    while marks:
        i, j = max(marks, key=lambda pair: (marks[pair].total, -pair[0], -pair[1]))
        if marks[i, j].tools == 0:
            break
        done += marks[i, j]
        left.discard(j)
        marks = {pair: one for pair, one in marks.items() if pair[0] != i and pair[1] != j}
    return done, [found[j] for j in sorted(left)]


def _beside(right: Chain, answer: Chain) -> Counts:
    """What an answer's chain has of a right one."""
    theirs = {call.tool.gives: call for call in answer}
    made = Counts()
    source_right = False
    for call in right:
        other = theirs.get(call.tool.gives)
        if other is None or other.tool is not call.tool:
            source_right = False
            continue
        arguments = sum(_argument(call, other, name) for name in call.literals)
        made.tools += 1
        made.calls += other.valid
        made.arguments += arguments
        made.variables += source_right
        source_right = arguments == len(call.literals)
    same_tools = [call.tool for call in right] == [call.tool for call in answer]
    made.sequences = float(same_tools)
    made.plans = float(same_tools and made.total == (_due(right).total - 1))
    return made


def _argument(right: Call, answer: Call, name: str) -> float:
    """How right a value is, from 0 to 1."""
    kind, wanted, given = right.tool.literals[name], right.literals[name], answer.literals[name]
    if wanted is VAGUE:
        return float(kind.accepts(given))
    if isinstance(kind, Level):
        return _likeness(wanted, given)
    return float(type(given) is type(wanted) and given == wanted)


def _likeness(wanted: Any, given: Any) -> float:
    ratio = SequenceMatcher(None, str(wanted).lower(), str(given).lower(), autojunk=False).ratio()
    return 1.0 if ratio >= ALIKE else ratio
