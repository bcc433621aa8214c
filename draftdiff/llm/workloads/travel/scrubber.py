"""The Scrubber: leave out rows and columns that cannot serve a wish (after the study of arXiv 2408.06318).

A compression by rule, to hold SpecPC against. It reads the wish from its text alone, as the study's does.
"""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import date

from draftdiff.errors import UserError
from draftdiff.llm.workloads.travel.sandbox import FLIGHT, MODES, Leg, Query, Sandbox, Stay

_TRIP = re.compile(
    r"a trip of (?P<days>\d+) days for (?:one person|(?P<people>\d+) people) from (?P<origin>.+?) to "
    r"(?:the city of (?P<city>.+?)|\d+ cities of the region (?P<region>.+?)), from (?P<start>[\d-]+) to [\d-]+, "
    r"for at most (?P<budget>\d+) dollars\."
)
_RULE = re.compile(r"The house must allow (.+?)\.")
_ROOM = re.compile(r"We want (?:rooms of the kind )?(.+?)\.")
_FOOD = re.compile(r"We would like to eat (.+?) food\.")
_WITHOUT = re.compile(r"No (.+?), please\.")


def constraints(text: str) -> Query:
    """The wish that a text states. Raises UserError for a text that states none."""
    trip = _TRIP.search(text)
    if trip is None:
        raise UserError(f"the text states no trip: {text[:60]!r}")
    rule, room, food, without = (
        found and found[1] for found in (p.search(text) for p in (_RULE, _ROOM, _FOOD, _WITHOUT))
    )
    return Query(
        trip["origin"],
        trip["city"] or trip["region"],
        int(trip["days"]),
        int(trip["people"] or 1),
        date.fromisoformat(trip["start"]),
        int(trip["budget"]),
        rule,
        room,
        tuple(food.split(" and ")) if food else (),
        next((mode for mode in MODES if mode.lower() == without), None),
    )


def scrub(sandbox: Sandbox, query: Query) -> Sandbox:
    """What of a sandbox can be part of a plan for the wish, in the columns that a rule reads."""
    here = set(sandbox.region)
    return Sandbox(
        sandbox.region,
        tuple(
            replace(one, extra=())
            for one in sandbox.restaurants
            if one.city in here and one.cost * query.people <= query.budget
        ),
        tuple(replace(one, extra=()) for one in sandbox.stays if one.city in here and _stay_serves(one, query)),
        tuple(replace(one, extra=()) for one in sandbox.sights if one.city in here),
        tuple(replace(one, extra=()) for one in sandbox.legs if _leg_serves(one, query)),
    )


def _stay_serves(stay: Stay, query: Query) -> bool:
    longest = query.days - query.cities  # nights, when all other cities have one
    cost = stay.price * stay.nights * -(-query.people // stay.people)
    fits = stay.nights <= longest and cost <= query.budget
    return fits and query.allows_room(stay.room) and query.rule not in stay.forbids


def _leg_serves(leg: Leg, query: Query) -> bool:
    if leg.mode == query.without or leg.cost(query.people) > query.budget:
        return False
    if leg.mode != FLIGHT:
        return True
    # Home is left on the first day and reached on the last.
    if query.origin in (leg.origin, leg.destination):
        return leg.day == (1 if leg.origin == query.origin else query.days)
    return leg.day not in (1, query.days)
