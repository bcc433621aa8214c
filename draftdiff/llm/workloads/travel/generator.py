"""Seeded wishes with a sandbox in which a plan for each exists, traps that nearly do, and rows and columns of noise.

The plan comes first and the budget after it: what the plan costs, and room for one change of any kind, so that a plan
with one mistake has that mistake alone. Traps: a house that costs the whole budget, one that wants longer stays, and
for each thing that the wish asks of houses one that lacks it alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date, timedelta
from itertools import permutations

from draftdiff.llm.workloads.travel.plan import MEALS, Plan, place
from draftdiff.llm.workloads.travel.rules import Trip
from draftdiff.llm.workloads.travel.sandbox import (
    FLIGHT,
    HOUSE_RULES,
    NIGHTS,
    ROOM_WISHES,
    ROOMS,
    SELF_DRIVING,
    TAXI,
    Leg,
    Query,
    Restaurant,
    Sandbox,
    Sight,
    Stay,
)  # fmt: skip
from draftdiff.llm.workloads.travel.solver import solve

CUISINES = ("Italian", "Mexican", "Indian", "Chinese", "French", "Thai", "Greek", "Japanese")
DAYS = (3, 5, 7)
LEVELS = ("easy", "medium", "hard")  # nothing but a budget, one wish more, three more
_SOUNDS = (
    "ba",
    "der",
    "fol",
    "gar",
    "hil",
    "kan",
    "lor",
    "mir",
    "nes",
    "por",
    "ras",
    "sel",
    "tor",
    "vel",
    "win",
    "zan",
)
_ENDS = ("ton", "burg", "field", "ford", "mouth", "stead", "ville", "wick")
_KINDS = {
    "restaurant": ("Kitchen", "Grill", "Table", "Diner", "Bistro", "Cantina", "Tavern", "Oven"),
    "stay": ("House", "Loft", "Rooms", "Lodge", "Flat", "Inn", "Court", "Villa"),
    "sight": ("Museum", "Park", "Gallery", "Tower", "Garden", "Market", "Bridge", "Theatre"),
}


@dataclass(frozen=True)
class World:
    """level: how much the wish states."""

    query: Query
    sandbox: Sandbox
    gold: Plan
    level: str


def world(seed: str, days: int, level: str, noise: float, rows: int = 9, others: int = 1) -> World:
    """A wish, its sandbox and a plan that passes.

    seed: any text.  noise: from 0 to 1, of further cities, rows and columns; 1 makes about 10,000 tokens.  rows:
    restaurants of a city without noise.  others: cities beside those of the region, without noise.
    """
    for attempt in range(1000):
        chance = random.Random(f"{seed} {attempt}")
        made = _Maker(chance, days, noise, rows, others)
        sandbox = made.sandbox()
        query = made.query(level)
        gold = solve(sandbox, query)
        if gold is not None:
            budget = _budget(sandbox, query, gold, chance)
            query = replace(query, budget=budget)
            return World(query, made.mixed(made.trapped(sandbox, query, gold)), gold, level)
    raise RuntimeError(f"no plan in 1000 sandboxes of seed {seed!r}")  # never seen: one in a few has one


class _Maker:
    """Draws names, tables and a wish."""

    def __init__(self, chance: random.Random, days: int, noise: float, rows: int, others: int) -> None:
        self.chance, self.days, self.noise = chance, days, noise
        self.rows = rows + round(12 * noise)
        self.names: set[str] = set()
        self.start = date(2026, 1, 1) + timedelta(days=chance.randrange(365))
        count = (days - 1) // 2
        self.region = tuple(self.town() for _ in range(count + (1 if count > 1 else 0)))
        self.others = tuple(self.town() for _ in range(others + round(2 * noise)))
        self.origin, self.region_name = self.town(), self.town()

    def fresh(self, make: Iterator[str]) -> str:
        name = next(one for one in make if one not in self.names)
        self.names.add(name)
        return name

    def town(self) -> str:
        return self.fresh(self.word().capitalize() + self.chance.choice(_ENDS) for _ in iter(int, 1))

    def word(self) -> str:
        return "".join(self.chance.choice(_SOUNDS) for _ in range(2))

    def named(self, kind: str) -> str:
        return self.fresh(f"{self.word().capitalize()} {self.chance.choice(_KINDS[kind])}" for _ in iter(int, 1))

    def query(self, level: str) -> Query:
        chance = self.chance
        wishes = ("rule", "room", "cuisines", "without")
        count, among = {"easy": (0, wishes), "medium": (1, wishes[:3]), "hard": (3, wishes)}[level]
        stated = chance.sample(among, count)
        return Query(
            self.origin,
            self.region[0] if len(self.region) == 1 else self.region_name,
            self.days,
            1 if level == "easy" else chance.randint(2, 8),
            self.start,
            0,
            chance.choice(HOUSE_RULES) if "rule" in stated else None,
            chance.choice(ROOM_WISHES) if "room" in stated else None,
            tuple(chance.sample(CUISINES, 2)) if "cuisines" in stated else (),
            chance.choice((FLIGHT, SELF_DRIVING)) if "without" in stated else None,
        )

    def sandbox(self) -> Sandbox:
        cities = (*self.region, *self.others)
        columns = (
            {
                "restaurants": ("rating", "phone", "seats"),
                "stays": ("host", "reviews", "year"),
                "sights": ("street", "phone", "opened"),
                "legs": ("distance", "duration"),
            }
            if self.noise
            else {}
        )
        return Sandbox(
            self.region,
            tuple(self.restaurant(city) for city in cities for _ in range(self.rows)),
            tuple(self.stay(city) for city in cities for _ in range(self.rows * 2 // 3)),
            tuple(self.sight(city) for city in cities for _ in range(self.rows // 2)),
            tuple(self.legs()),
            columns,
        )

    def extra(self, *makers: str) -> tuple[str, ...]:
        chance = self.chance
        values = {
            "rating": lambda: f"{chance.uniform(1, 5):.1f}",
            "phone": lambda: f"{chance.randrange(10**3):03d}-{chance.randrange(10**4):04d}",
            "count": lambda: str(chance.randint(5, 500)),
            "name": lambda: self.word().capitalize(),
            "year": lambda: str(chance.randint(1900, 2025)),
            "km": lambda: f"{chance.randint(40, 900)} km",
            "hours": lambda: f"{chance.randint(1, 9)} h {chance.randint(0, 59)} min",
        }
        return tuple(values[name]() for name in makers) if self.noise else ()

    def restaurant(self, city: str) -> Restaurant:
        cuisines = tuple(self.chance.sample(CUISINES, self.chance.randint(1, 2)))
        return Restaurant(
            self.named("restaurant"), city, self.chance.randint(8, 80), cuisines, self.extra("rating", "phone", "count")
        )

    def stay(self, city: str) -> Stay:
        chance = self.chance
        forbids = tuple(rule for rule in HOUSE_RULES if chance.random() < 0.3)
        room, people, nights = chance.choice(ROOMS), chance.randint(1, 6), chance.choice((1, 1, 2, 2, 3, 5))
        extra = self.extra("name", "count", "year")
        return Stay(self.named("stay"), city, chance.randint(40, 400), room, forbids, people, nights, extra)

    def sight(self, city: str) -> Sight:
        return Sight(self.named("sight"), city, self.extra("name", "phone", "year"))

    def legs(self) -> Iterator[Leg]:
        """Ways between home and all cities of the region, in both directions; flights on the days that suit them, and
        with noise on others too."""
        chance = self.chance
        for a, b in permutations((self.origin, *self.region), 2):
            car = chance.randint(20, 220)
            yield Leg(SELF_DRIVING, a, b, car, extra=self.extra("km", "hours"))
            yield Leg(TAXI, a, b, 2 * car + chance.randint(10, 90), extra=self.extra("km", "hours"))
            days = range(1, self.days + 1)
            suiting = {1} if a == self.origin else {self.days} if b == self.origin else set(days[2:-1:2])
            for day in days:
                if day in suiting or chance.random() < self.noise / 3:
                    number = self.fresh(f"F{chance.randint(1000, 9999)}" for _ in iter(int, 1))
                    yield Leg(FLIGHT, a, b, chance.randint(60, 480), number, day, self.extra("km", "hours"))

    def trapped(self, sandbox: Sandbox, query: Query, gold: Plan) -> Sandbox:
        """With houses in the first city that lack one thing."""
        name, city = place(gold[0].accommodation)
        good = next(stay for stay in sandbox.stays if (stay.name, stay.city) == (name, city))
        traps = [
            replace(good, price=query.budget + self.chance.randint(1, 99)),
            replace(good, nights=self.chance.randint(NIGHTS + 1, 7)),
        ]
        if query.rule:
            traps.append(replace(good, forbids=tuple(r for r in HOUSE_RULES if r in (*good.forbids, query.rule))))
        if query.room:
            traps.append(replace(good, room=next(room for room in ROOMS[::-1] if not query.allows_room(room))))
        named = (replace(one, name=self.named("stay"), extra=self.extra("name", "count", "year")) for one in traps)
        return replace(sandbox, stays=(*sandbox.stays, *named))

    def mixed(self, sandbox: Sandbox) -> Sandbox:
        """Rows in an order that says nothing."""

        def shuffled(rows: tuple) -> tuple:
            return tuple(self.chance.sample(rows, len(rows)))

        return replace(
            sandbox,
            region=shuffled(sandbox.region),
            restaurants=shuffled(sandbox.restaurants),
            stays=shuffled(sandbox.stays),
            sights=shuffled(sandbox.sights),
            legs=shuffled(sandbox.legs),
        )


def _budget(sandbox: Sandbox, query: Query, gold: Plan, chance: random.Random) -> int:
    """What the plan costs, and what the dearest ways and three of the dearest meals would add."""
    legs = sum(max(leg.cost(query.people) for leg in sandbox.legs) for day in gold if day.route)
    meals = len(MEALS) * query.people * max(one.cost for one in sandbox.restaurants)
    return Trip(query, sandbox, gold).cost + legs + meals + chance.randint(0, 50)
