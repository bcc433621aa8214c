"""One way to break each rule of a good plan and no other; for tests, and to see what a score makes of a mistake.

Built from what the generator promises, not by asking the rules. None where the wish, or a sandbox of few rows, leaves
no such mistake. A plan with a hole or an invention in it fails all that the wish states too, as the rules say.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from draftdiff.llm.workloads.travel.generator import World
from draftdiff.llm.workloads.travel.plan import MEALS, NONE, Day, Plan, place, with_day, written_leg
from draftdiff.llm.workloads.travel.sandbox import NIGHTS, SELF_DRIVING, TAXI, Leg, Restaurant, Stay

WHOLE = 1  # the first day without travel


def mutate(rule: str, world: World, chance: random.Random) -> Plan | None:
    """The gold plan with the rule broken."""
    return MUTATIONS[rule](world, chance)


def _spare(world: World, chance: random.Random, city: str, plain: bool = True) -> list[str]:
    """Restaurants of a city that the plan does not use. plain: only those that serve nothing asked for."""
    used = {meal for day in world.gold for meal in day.meals}
    found = [
        f"{one.name}, {city}"
        for one in world.sandbox.restaurants
        if one.city == city and not (plain and set(one.cuisines) & set(world.query.cuisines))
    ]
    free = [name for name in found if name not in used]
    return chance.sample(free, len(free))


def _restaurant(world: World, meal: str) -> Restaurant:
    return next(one for one in world.sandbox.restaurants if (one.name, one.city) == place(meal))


def _plain_meal(world: World, chance: random.Random) -> str:
    """A meal of the whole day that no cuisine depends on: one name for breakfast, lunch or dinner."""
    day = world.gold[WHOLE]
    asked = set(world.query.cuisines)
    return chance.choice([meal for meal in MEALS if not set(_restaurant(world, getattr(day, meal)).cuisines) & asked])


def _route(world: World, chance: random.Random) -> Plan | None:
    """Stays where it is instead of going home."""
    city = world.gold[-2].current_city
    meals = _spare(world, chance, city, plain=False)
    used = {sight for day in world.gold for sight in day.sights}
    sights = [f"{one.name}, {city}" for one in world.sandbox.sights if one.city == city]
    free = [sight for sight in sights if sight not in used]
    if len(meals) < len(MEALS) or not free:
        return None
    return (*world.gold[:-1], Day(city, NONE, meals[0], meals[1], meals[2], chance.choice(free), NONE))


def _restaurant_twice(world: World, chance: random.Random) -> Plan:
    meal = _plain_meal(world, chance)
    other = chance.choice([one for one in (world.gold[0].dinner, *world.gold[WHOLE].meals)
                           if one != getattr(world.gold[WHOLE], meal)])  # fmt: skip
    return with_day(world.gold, WHOLE, **{meal: other})


def _sight_twice(world: World, chance: random.Random) -> Plan:
    return with_day(world.gold, WHOLE, attraction=world.gold[0].attraction)


def _other_stay(world: World, chance: random.Random, wrong: Callable[[Stay, Stay], bool]) -> Plan | None:
    """Another house for the first city, which differs from the good one in what is wrong alone."""
    name, city = place(world.gold[0].accommodation)
    good = next(one for one in world.sandbox.stays if (one.name, one.city) == (name, city))
    found = [one for one in world.sandbox.stays if one.city == city and one.people == good.people and wrong(one, good)]
    bed = f"{chance.choice(found).name}, {city}"
    return with_day(with_day(world.gold, 0, accommodation=bed), WHOLE, accommodation=bed)


def _too_short(world: World, chance: random.Random) -> Plan | None:
    def wrong(one: Stay, good: Stay) -> bool:
        same = (one.price, one.room, one.forbids) == (good.price, good.room, good.forbids)
        return same and one.nights > NIGHTS

    return _other_stay(world, chance, wrong)


def _two_ways(world: World, chance: random.Random) -> Plan | None:
    """Drives one way and lets itself be driven the other."""
    modes = {day.leg[0] for day in world.gold if day.leg is not None}
    other = TAXI if modes == {SELF_DRIVING} else SELF_DRIVING
    return None if world.query.without == other else _way(world, len(world.gold) - 1, other, world.gold)


def _way(world: World, number: int, mode: str, plan: Plan) -> Plan:
    leg = _leg(world, plan[number].route, mode, number + 1)
    return with_day(plan, number, transportation=written_leg(leg))


def _leg(world: World, route: tuple[str, str] | None, mode: str, day: int) -> Leg:
    return next(
        leg
        for leg in world.sandbox.legs
        if (leg.origin, leg.destination) == route and leg.mode == mode and leg.day in (None, day)
    )


def _elsewhere(world: World, chance: random.Random) -> Plan | None:
    """Eats in a city where it never is."""
    visited = {city for day in world.gold for city in day.cities}
    others = sorted({one.city for one in world.sandbox.restaurants} - visited)
    meals = [meal for city in others for meal in _spare(world, chance, city)]
    return with_day(world.gold, WHOLE, **{_plain_meal(world, chance): chance.choice(meals)}) if meals else None


def _invented(world: World, chance: random.Random) -> Plan:
    meal = _plain_meal(world, chance)
    name, city = place(getattr(world.gold[WHOLE], meal))
    at = chance.randrange(1, len(name) - 1)
    return with_day(world.gold, WHOLE, **{meal: f"{name[:at]}q{name[at:]}, {city}"})


def _hole(world: World, chance: random.Random) -> Plan:
    return with_day(world.gold, WHOLE, **{_plain_meal(world, chance): NONE})


def _too_dear(world: World, chance: random.Random) -> Plan | None:
    def wrong(one: Stay, good: Stay) -> bool:
        same = (one.room, one.forbids, one.nights) == (good.room, good.forbids, good.nights)
        return same and one.price > world.query.budget

    return _other_stay(world, chance, wrong)


def _forbidden(world: World, chance: random.Random) -> Plan | None:
    rule = world.query.rule
    if rule is None:
        return None

    def wrong(one: Stay, good: Stay) -> bool:
        same = (one.price, one.room, one.nights) == (good.price, good.room, good.nights)
        return same and set(one.forbids) == {*good.forbids, rule}

    return _other_stay(world, chance, wrong)


def _wrong_room(world: World, chance: random.Random) -> Plan | None:
    if world.query.room is None:
        return None

    def wrong(one: Stay, good: Stay) -> bool:
        same = (one.price, one.forbids, one.nights) == (good.price, good.forbids, good.nights)
        return same and not world.query.allows_room(one.room)

    return _other_stay(world, chance, wrong)


def _no_cuisine(world: World, chance: random.Random) -> Plan | None:
    """Something else instead of the one meal that has it."""
    for number, day in enumerate(world.gold):
        for meal in MEALS:
            said = getattr(day, meal)
            if said != NONE and set(_restaurant(world, said).cuisines) & set(world.query.cuisines):
                spare = _spare(world, chance, place(said)[1])
                return with_day(world.gold, number, **{meal: spare[0]}) if spare else None
    return None


def _unwanted_way(world: World, chance: random.Random) -> Plan | None:
    """Goes all the way as was not wanted."""
    if world.query.without is None:
        return None
    plan = world.gold
    for number, day in enumerate(plan):
        if day.route is not None:
            plan = _way(world, number, world.query.without, plan)
    return plan


MUTATIONS: dict[str, Callable[[World, random.Random], Plan | None]] = {
    "route": _route,
    "diverse_restaurants": _restaurant_twice,
    "diverse_attractions": _sight_twice,
    "minimum_nights": _too_short,
    "transport_without_conflict": _two_ways,
    "within_current_city": _elsewhere,
    "within_sandbox": _invented,
    "complete": _hole,
    "budget": _too_dear,
    "room_rule": _forbidden,
    "room_type": _wrong_room,
    "cuisine": _no_cuisine,
    "transport": _unwanted_way,
}
