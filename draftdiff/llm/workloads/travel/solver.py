"""A plan that passes: the cheapest way, the cheapest house that will do, cheap food with every cuisine asked for.

Used by the generator before the budget is set, so it looks at all of a wish but the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, permutations

from draftdiff.llm.workloads.travel.plan import MEALS, NONE, Day, Plan, written_leg
from draftdiff.llm.workloads.travel.sandbox import (
    FLIGHT,
    NIGHTS,
    SELF_DRIVING,
    TAXI,
    Leg,
    Query,
    Restaurant,
    Sandbox,
    Stay,
)

# Meals of a visit of NIGHTS nights: dinner on the day of arrival, then a whole day.
VISIT_MEALS = 1 + len(MEALS)


def solve(sandbox: Sandbox, query: Query) -> Plan | None:
    """The cheapest plan of its kind, None if there is none: two nights in each city, no meals on the last day."""
    best: tuple[int, Plan] | None = None
    for cities in permutations(sandbox.region, query.cities):
        legs, stays, tables = ways(sandbox, query, cities), houses(sandbox, query, cities), food(sandbox, query, cities)
        if legs is None or stays is None or tables is None:
            continue
        cost = sum(leg.cost(query.people) for leg in legs)
        cost += sum(NIGHTS * stay.price * -(-query.people // stay.people) for stay in stays)
        cost += query.people * sum(price for _, price in tables)
        if best is None or cost < best[0]:
            plan = _plan(sandbox, cities, legs, stays, [name for name, _ in tables])
            best = best if plan is None else (cost, plan)
    return None if best is None else best[1]


def ways(sandbox: Sandbox, query: Query, cities: Sequence[str]) -> list[Leg] | None:
    """A leg for each day of travel: all by car, or the cheaper of flight and taxi each time."""
    stops = [query.origin, *cities, query.origin]
    options = []
    for modes in ((FLIGHT, TAXI), (SELF_DRIVING,)):
        allowed = [mode for mode in modes if mode != query.without]
        legs = [
            min(
                (
                    leg
                    for leg in sandbox.legs
                    if (leg.origin, leg.destination) == (a, b)
                    and leg.mode in allowed
                    and leg.day in (None, 1 + NIGHTS * number)
                ),
                key=lambda leg: leg.cost(query.people),
                default=None,
            )
            for number, (a, b) in enumerate(pairwise(stops))
        ]
        if all(leg is not None for leg in legs):
            options.append([leg for leg in legs if leg is not None])
    return min(options, key=lambda legs: sum(leg.cost(query.people) for leg in legs), default=None)


def houses(sandbox: Sandbox, query: Query, cities: Sequence[str]) -> list[Stay] | None:
    """The cheapest house that will do in each city."""
    found = []
    for city in cities:
        fitting = [stay for stay in sandbox.stays if stay.city == city and suits(stay, query)]
        if not fitting:
            return None
        found.append(min(fitting, key=lambda stay: stay.price * -(-query.people // stay.people)))
    return found


def suits(stay: Stay, query: Query) -> bool:
    """Whether a house does for the wish but the budget."""
    return query.allows_room(stay.room) and query.rule not in stay.forbids and stay.nights <= NIGHTS


def food(sandbox: Sandbox, query: Query, cities: Sequence[str]) -> list[tuple[str, int]] | None:
    """Names and prices of the meals of all visits: every cuisine once, in the first city that has it, and no other of
    those asked for beside it; the rest from the cheapest that have none of them."""
    wanted = list(query.cuisines)
    found: list[tuple[str, int]] = []
    for city in cities:
        there = sorted((one for one in sandbox.restaurants if one.city == city), key=lambda one: (one.cost, one.name))
        chosen: list[Restaurant] = []
        for one in there:
            asked = [cuisine for cuisine in one.cuisines if cuisine in query.cuisines]
            if len(asked) == 1 and asked[0] in wanted and len(chosen) < VISIT_MEALS:
                wanted.remove(asked[0])
                chosen.append(one)
        plain = [one for one in there if not set(one.cuisines) & set(query.cuisines)]
        chosen += plain[: VISIT_MEALS - len(chosen)]
        if len(chosen) < VISIT_MEALS:
            return None
        found += [(f"{one.name}, {city}", one.cost) for one in chosen]
    return None if wanted else found


def _plan(
    sandbox: Sandbox, cities: Sequence[str], legs: Sequence[Leg], stays: Sequence[Stay], meals: Sequence[str]
) -> Plan | None:
    days = []
    for number, (city, stay) in enumerate(zip(cities, stays)):
        sights = [f"{one.name}, {city}" for one in sandbox.sights if one.city == city]
        if len(sights) < NIGHTS:
            return None
        dinner, first, second, third = meals[VISIT_MEALS * number : VISIT_MEALS * (number + 1)]
        bed = f"{stay.name}, {city}"
        days.append(_travel(legs[number], dinner=dinner, attraction=sights[0], accommodation=bed))
        days.append(Day(city, NONE, first, second, third, sights[1], bed))
    return (*days, _travel(legs[-1]))


def _travel(leg: Leg, **rest: str) -> Day:
    return Day(f"from {leg.origin} to {leg.destination}", written_leg(leg), **rest)
