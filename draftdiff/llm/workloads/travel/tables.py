"""A sandbox as text: the tables that a model reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from draftdiff.llm.workloads.travel.plan import NONE
from draftdiff.llm.workloads.travel.sandbox import Query, Sandbox


def tables(sandbox: Sandbox, query: Query) -> str:
    """All tables, one after the other; rows of a city stand together."""
    extra = sandbox.columns.get
    parts = []
    if query.cities > 1:
        parts.append(f"Cities of {query.region}: {', '.join(sandbox.region)}")
    cities = list(dict.fromkeys([*sandbox.region, *(one.city for one in sandbox.restaurants)]))
    for city in cities:
        parts += [
            _table(
                f"Restaurants in {city}",
                ("name", "meal for one", "cuisines", *extra("restaurants", ())),
                [(x.name, x.cost, "/".join(x.cuisines), *x.extra) for x in sandbox.restaurants if x.city == city],
            ),
            _table(
                f"Accommodations in {city}",
                ("name", "night", "room", "people", "least nights", "forbidden", *extra("stays", ())),
                [
                    (x.name, x.price, x.room, x.people, x.nights, "/".join(x.forbids) or NONE, *x.extra)
                    for x in sandbox.stays
                    if x.city == city
                ],
            ),
            _table(
                f"Attractions in {city}",
                ("name", *extra("sights", ())),
                [(x.name, *x.extra) for x in sandbox.sights if x.city == city],
            ),
        ]
    ways = list(dict.fromkeys((leg.origin, leg.destination) for leg in sandbox.legs))
    parts += [
        _table(
            f"From {a} to {b}",
            ("mode", "date", "price", *extra("legs", ())),
            [
                (
                    f"{x.mode} {x.number}" if x.number else x.mode,
                    query.date(x.day) if x.day else NONE,
                    x.price,
                    *x.extra,
                )
                for x in sandbox.legs
                if (x.origin, x.destination) == (a, b)
            ],
        )
        for a, b in ways
    ]
    return "\n".join(part for part in parts if part)


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [" | ".join(map(str, row)) for row in rows]
    return "\n".join([f"{title} ({' | '.join(header)})", *lines]) if lines else ""
