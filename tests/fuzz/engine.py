"""Random cases until the time is up: drawn and shrunk by hypothesis, the same for the same seed.

A family is a strategy of cases and a check. A case is a dataclass of plain values whose repr is Python, so what fails
is printed as a program of two lines.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.strategies import SearchStrategy

_QUIET = {
    "database": None,
    "deadline": None,
    "phases": (Phase.generate, Phase.shrink),
    "report_multiple_bugs": False,
    "suppress_health_check": list(HealthCheck),
    "verbosity": Verbosity.quiet,
}


class Case:
    """A dataclass of plain values, written as what it differs in from the defaults."""

    def __repr__(self) -> str:
        given = ((f.name, getattr(self, f.name), f.default) for f in fields(self))  # type: ignore[arg-type]
        return (
            f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value, usual in given if value != usual)})"
        )


@dataclass(frozen=True)
class Family:
    """cases: what to draw.  check: raises unless the case is as it should be; what it returns is counted.
    batch: cases of one seed."""

    name: str
    cases: SearchStrategy[Any]
    check: Callable[[Any], str]
    batch: int


class Failure(AssertionError):
    """The smallest case that fails, as a program."""


def run_seed(family: Family, number: int, cases: int) -> Counter[str]:
    """Check that many cases, or a few fewer. Returns how many of each kind; raises Failure."""
    counts: Counter[str] = Counter()
    failed: list[Any] = []

    @seed(number)
    @settings(max_examples=cases, **_QUIET)
    @given(family.cases)
    def one(case: Any) -> None:
        try:
            counts[family.check(case)] += 1
        except Exception:
            failed.append(case)
            raise

    try:
        one()
    except Exception as error:
        module = type(failed[-1]).__module__
        program = f"from math import inf, nan\nfrom {module} import *\n{family.check.__name__}({failed[-1]!r})"
        raise Failure(f"{family.name}, seed {number}:\n\n{program}\n\n{type(error).__name__}: {error}") from error
    return counts


def run_for(family: Family, seconds: float, first: int) -> Counter[str]:
    """Seeds from `first` on until the time is up, at least one."""
    counts: Counter[str] = Counter()
    number, end = first, time.monotonic() + seconds
    while number == first or time.monotonic() < end:
        counts += run_seed(family, number, family.batch)
        number += 1
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
    print(f"\n{family.name}: {counts.total()} cases, seeds {first} to {number - 1} ({kinds})", flush=True)
    return counts
