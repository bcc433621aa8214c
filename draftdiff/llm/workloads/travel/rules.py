"""The thirteen rules of a plan: eight of common sense, five that the wish states (TravelPlanner, arXiv 2402.01622).

Each is a function of the trip that says whether it holds. What a rule cannot find in the sandbox it leaves to the rule
that is about that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from draftdiff.llm.workloads.travel.plan import MEALS, NONE, Day, Plan, place
from draftdiff.llm.workloads.travel.sandbox import FLIGHT, SELF_DRIVING, Leg, Query, Restaurant, Sandbox, Stay


@dataclass(frozen=True)
class Trip:
    """A plan beside what it was made from. The properties look its entries up; an unknown one is None."""

    query: Query
    sandbox: Sandbox
    plan: Plan

    @cached_property
    def meals(self) -> list[tuple[int, Restaurant | None]]:
        known = {(one.name, one.city): one for one in self.sandbox.restaurants}
        return [(number, known.get(place(meal))) for number, day in enumerate(self.plan) for meal in day.meals]

    @cached_property
    def nights(self) -> list[tuple[int, Stay | None]]:
        known = {(one.name, one.city): one for one in self.sandbox.stays}
        there = [(number, day.accommodation) for number, day in enumerate(self.plan) if day.accommodation != NONE]
        return [(number, known.get(place(stay))) for number, stay in there]

    @cached_property
    def legs(self) -> list[tuple[int, Leg | None]]:
        known = {(one.mode, one.number, one.origin, one.destination, one.day): one for one in self.sandbox.legs}
        found = []
        for number, day in enumerate(self.plan):
            if day.transportation != NONE:
                said = day.leg
                flies = said is not None and said[0] == FLIGHT
                found.append((number, said and known.get((*said, number + 1 if flies else None))))
        return found

    @property
    def modes(self) -> set[str]:
        return {day.leg[0] for day in self.plan if day.leg is not None}

    @property
    def cost(self) -> int:
        """Of all that is known, in dollars."""
        people = self.query.people
        meals = sum(one.cost * people for _, one in self.meals if one)
        nights = sum(one.price * -(-people // one.people) for _, one in self.nights if one)
        return meals + nights + sum(one.cost(people) for _, one in self.legs if one)


def route(trip: Trip) -> bool:
    """From home through as many cities of the region as asked for, each visited once, and back home."""
    stops: list[str] = []
    for day in trip.plan:
        cities = day.cities
        if stops and cities[0] != stops[-1]:
            return False  # a jump
        stops += [city for city in (cities if not stops else cities[1:]) if not stops or city != stops[-1]]
    home, visited = trip.query.origin, stops[1:-1]
    return (
        trip.plan[0].route is not None
        and stops[0] == stops[-1] == home
        and len(visited) == len(set(visited)) == trip.query.cities
        and set(visited) <= set(trip.sandbox.region)
    )


def diverse_restaurants(trip: Trip) -> bool:
    meals = [meal for day in trip.plan for meal in day.meals]
    return len(meals) == len(set(meals))


def diverse_attractions(trip: Trip) -> bool:
    sights = [sight for day in trip.plan for sight in day.sights]
    return len(sights) == len(set(sights))


def minimum_nights(trip: Trip) -> bool:
    """Every stay is as long as its house demands."""
    runs: list[tuple[Stay | None, int]] = []
    for (before, _), (number, stay) in pairwise([(-9, None), *trip.nights]):
        if runs and runs[-1][0] == stay and number == before + 1:
            runs[-1] = (stay, runs[-1][1] + 1)
        else:
            runs.append((stay, 1))
    return all(stay is None or count >= stay.nights for stay, count in runs)


def transport_without_conflict(trip: Trip) -> bool:
    """Whoever drives has the car with him: no flight, no taxi."""
    return SELF_DRIVING not in trip.modes or len(trip.modes) == 1


def within_current_city(trip: Trip) -> bool:
    """Meals, sights, the night and the way are where the day is."""
    for day in trip.plan:
        named = [*day.meals, *day.sights]
        if any(place(one)[1] not in day.cities for one in named):
            return False
        if day.accommodation != NONE and place(day.accommodation)[1] != day.cities[-1]:
            return False
        if day.leg is not None and day.route != day.leg[2:]:
            return False
    return True


def within_sandbox(trip: Trip) -> bool:
    """Nothing is made up."""
    sights = {(one.name, one.city) for one in trip.sandbox.sights}
    seen = all(place(sight) in sights for day in trip.plan for sight in day.sights)
    return seen and all(one is not None for _, one in [*trip.meals, *trip.nights, *trip.legs])


def complete(trip: Trip) -> bool:
    """A way on days of travel, else three meals and a sight; a bed for all nights but the last day's."""
    return all(_complete(day, number + 1 == len(trip.plan)) for number, day in enumerate(trip.plan))


def _complete(day: Day, last: bool) -> bool:
    if day.current_city == NONE or (day.accommodation == NONE and not last):
        return False
    if day.route is not None:
        return day.transportation != NONE
    return all(getattr(day, meal) != NONE for meal in MEALS) and bool(day.sights)


def budget(trip: Trip) -> bool | None:
    return trip.cost <= trip.query.budget


def room_rule(trip: Trip) -> bool | None:
    rule = trip.query.rule
    return None if rule is None else all(stay is None or rule not in stay.forbids for _, stay in trip.nights)


def room_type(trip: Trip) -> bool | None:
    if trip.query.room is None:
        return None
    return all(stay is None or trip.query.allows_room(stay.room) for _, stay in trip.nights)


def cuisine(trip: Trip) -> bool | None:
    """Every cuisine is eaten at least once away from home."""
    if not trip.query.cuisines:
        return None
    eaten = {one for _, meal in trip.meals if meal and meal.city != trip.query.origin for one in meal.cuisines}
    return set(trip.query.cuisines) <= eaten


def transport(trip: Trip) -> bool | None:
    return None if trip.query.without is None else trip.query.without not in trip.modes


def grounded(trip: Trip) -> float:
    """Share of what the plan's days need, ways, meals, sights and nights, that names something in the tables."""
    sights = {(one.name, one.city) for one in trip.sandbox.sights}
    there = {
        "way": {number for number, one in trip.legs if one},
        "night": {number for number, one in trip.nights if one},
    }
    meals = [number for number, one in trip.meals if one]
    due = found = 0
    for number, day in enumerate(trip.plan):
        if day.route is not None:
            due, found = due + 1, found + (number in there["way"])
        else:
            due, found = due + len(MEALS) + 1, found + meals.count(number)
            found += any(place(sight) in sights for sight in day.sights)
        if number + 1 < len(trip.plan):
            due, found = due + 1, found + (number in there["night"])
    return found / due


COMMONSENSE: dict[str, Callable[[Trip], bool]] = {
    rule.__name__: rule
    for rule in (
        route, diverse_restaurants, diverse_attractions, minimum_nights, transport_without_conflict,
        within_current_city, within_sandbox, complete,
    )
}  # fmt: skip
HARD: dict[str, Callable[[Trip], bool | None]] = {
    rule.__name__: rule for rule in (budget, room_rule, room_type, cuisine, transport)
}


def verdicts(trip: Trip) -> dict[str, bool | None]:
    """Of each rule whether it holds, None where the wish does not state it.

    Those that the wish states hold for nothing in a plan that is not complete or not from the sandbox: half a plan is
    cheap, and what is made up has no price.
    """
    found: dict[str, bool | None] = {name: rule(trip) for name, rule in COMMONSENSE.items()}
    sound = bool(found["complete"] and found["within_sandbox"])
    for name, rule in HARD.items():
        holds = rule(trip)
        found[name] = holds if holds is None else holds and sound
    return found
