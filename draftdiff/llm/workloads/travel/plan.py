"""A plan: one entry a day, as JSON, read with the care that a model's text needs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from draftdiff.errors import UserError
from draftdiff.llm.workloads.travel.sandbox import FLIGHT, MODES, Leg

NONE, MEALS = "-", ("breakfast", "lunch", "dinner")
_ROUTE = re.compile(r"from (.+?) to (.+)")
_LEG = re.compile(rf"({'|'.join(MODES)})(?: (\S+?))?, from (.+?) to (.+)")


class NoPlan(UserError):
    """Why a text holds no plan."""


@dataclass(frozen=True)
class Day:
    """Texts as they were written; "-" where there is nothing. Places are written "Name, City", several sights with
    semicolons between them."""

    current_city: str
    transportation: str = NONE
    breakfast: str = NONE
    lunch: str = NONE
    dinner: str = NONE
    attraction: str = NONE
    accommodation: str = NONE

    @property
    def route(self) -> tuple[str, str] | None:
        """From where to where, on a day of travel."""
        found = _ROUTE.fullmatch(self.current_city)
        return (found[1], found[2]) if found else None

    @property
    def cities(self) -> tuple[str, ...]:
        return self.route or (self.current_city,)

    @property
    def meals(self) -> list[str]:
        return [getattr(self, meal) for meal in MEALS if getattr(self, meal) != NONE]

    @property
    def sights(self) -> list[str]:
        return [part.strip() for part in self.attraction.split(";") if part.strip() not in ("", NONE)]

    @property
    def leg(self) -> tuple[str, str | None, str, str] | None:
        """Mode, number of a flight, from where and to where; None where it is not written so."""
        found = _LEG.fullmatch(self.transportation)
        return (found[1], found[2], found[3], found[4]) if found else None


Plan = tuple[Day, ...]
FIELDS = tuple(one.name for one in fields(Day))


def place(text: str) -> tuple[str, str]:
    """Name and city of "Name, City"; the city is empty where there is none."""
    name, _, city = text.rpartition(", ")
    return (name, city) if name else (city, "")


def written_leg(leg: Leg) -> str:
    number = f" {leg.number}" if leg.mode == FLIGHT else ""
    return f"{leg.mode}{number}, from {leg.origin} to {leg.destination}"


def written(plan: Sequence[Day]) -> str:
    """A plan as models are asked to write it."""
    days = [{"day": number, **vars(day)} for number, day in enumerate(plan, start=1)]
    return json.dumps(days, separators=(",", ":"), ensure_ascii=False)


def parse(text: str, days: int) -> Plan:
    """The plan of a text, which begins at its first "[". A field that is not there is "-".

    Raises NoPlan, in one line, for no JSON, another number of days, and what is no text.
    """
    start = text.find("[")
    if start < 0:
        raise NoPlan("the text holds no list of days")
    try:
        content, _ = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise NoPlan(f"the text is no JSON: {error}") from None
    if len(content) != days:
        raise NoPlan(f"the plan has {len(content)} days instead of {days}")
    return tuple(map(_day, content))


def _day(content: Any) -> Day:
    if not isinstance(content, dict):
        raise NoPlan(f"a day is {str(content)[:40]!r}")
    said = {name: content.get(name, NONE) for name in FIELDS}
    for name, value in said.items():
        if not isinstance(value, str):
            raise NoPlan(f"{name} is {str(value)[:40]!r}")
    return Day(**{name: value.strip() or NONE for name, value in said.items()})


def with_day(plan: Plan, number: int, **changes: str) -> Plan:
    """The plan with another day, counted from 0."""
    return tuple(replace(day, **changes) if at == number else day for at, day in enumerate(plan))
