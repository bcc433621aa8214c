"""What a trip can be made of: tables of restaurants, stays, sights, flights and roads, and the wish that they serve."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date, timedelta

SELF_DRIVING, TAXI, FLIGHT = "Self-driving", "Taxi", "Flight"
MODES = (FLIGHT, TAXI, SELF_DRIVING)
SEATS = {SELF_DRIVING: 5, TAXI: 4, FLIGHT: 1}
ROOMS = ("entire home", "private room", "shared room")
ROOM_WISHES = (*ROOMS, "not a shared room")
HOUSE_RULES = ("smoking", "parties", "children under 10", "pets", "visitors")
NIGHTS = 2  # in each city


@dataclass(frozen=True)
class Restaurant:
    """cost: of a meal for one."""

    name: str
    city: str
    cost: int
    cuisines: tuple[str, ...]
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stay:
    """price: of a room for a night.  forbids: house rules.  people: in a room.  nights: fewest in a row."""

    name: str
    city: str
    price: int
    room: str
    forbids: tuple[str, ...]
    people: int
    nights: int
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sight:
    name: str
    city: str
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Leg:
    """A way from one city to another. number: of a flight.  day: of the trip on which it flies, None of a road.  price:
    of a seat in a flight, of a car otherwise."""

    mode: str
    origin: str
    destination: str
    price: int
    number: str | None = None
    day: int | None = None
    extra: tuple[str, ...] = ()

    def cost(self, people: int) -> int:
        return self.price * -(-people // SEATS[self.mode])


@dataclass(frozen=True)
class Sandbox:
    """region: the cities that may be visited, which others surround.  columns: names of the extra ones, by table."""

    region: tuple[str, ...]
    restaurants: tuple[Restaurant, ...]
    stays: tuple[Stay, ...]
    sights: tuple[Sight, ...]
    legs: tuple[Leg, ...]
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Query:
    """A wish. region: whose cities are visited, `cities` of them; of three days the one city.  Of what follows the
    budget only what is not None or empty is asked for. rule: what the house must not forbid.  without: a mode of
    transport that is not wanted."""

    origin: str
    region: str
    days: int
    people: int
    start: date
    budget: int
    rule: str | None = None
    room: str | None = None
    cuisines: tuple[str, ...] = ()
    without: str | None = None

    @property
    def cities(self) -> int:
        return (self.days - 1) // 2

    def date(self, day: int) -> str:
        return (self.start + timedelta(days=day - 1)).isoformat()

    def allows_room(self, room: str) -> bool:
        return self.room is None or (room != "shared room" if self.room == ROOM_WISHES[-1] else room == self.room)

    def in_words(self) -> str:
        """The wish as a person would say it; `scrubber.constraints` reads it back."""
        what = f"the city of {self.region}" if self.cities == 1 else f"{self.cities} cities of the region {self.region}"
        who = "one person" if self.people == 1 else f"{self.people} people"
        said = [
            f"Please plan a trip of {self.days} days for {who} from {self.origin} to {what}, "
            f"from {self.date(1)} to {self.date(self.days)}, for at most {self.budget} dollars."
        ]
        if self.rule:
            said.append(f"The house must allow {self.rule}.")
        if self.room:
            said.append(f"We want {self.room if self.room.startswith('not') else f'rooms of the kind {self.room}'}.")
        if self.cuisines:
            said.append(f"We would like to eat {' and '.join(self.cuisines)} food.")
        if self.without:
            said.append(f"No {self.without.lower()}, please.")
        return " ".join(said)
