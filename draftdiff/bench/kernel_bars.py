"""What the kernels set out to reach, beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

ALL = ("cpu-64", "cpu-128", "cpu-ragged")
EVEN = ALL[:2]
# Backend, density, the largest share of dense SDPA's time that we allow ourselves, and where. The torch backend is the
# fallback without a compiler and multiplies empty slots too: no bar there.
OF_DENSE_TIME = (
    ("cpu + tail + tokens", 0.1, 0.12, ALL),
    ("cpu + tail + tokens", 0.25, 0.28, ALL),
    ("cpu + tail + tokens", 0.5, 0.55, ALL),
    ("torch + tail", 0.1, 0.30, EVEN),
    ("torch + tail", 0.25, 0.65, EVEN),
    ("draft + select", 0.25, 0.04, ALL),
    ("draft + probe", 0.25, 0.06, ALL),
)
# Of the Triton kernel: TFLOP/s of its dense mode, and of that rate at a density of 0.15.
DENSE_RATE = {"wan-14b": 450.0, "wan-14b-64": 340.0}
RATE_KEPT = 0.85
# Whom it has to match up to half density.
MATCHED = ("FlexAttention", "FlashInfer", "VSA (fastvideo-kernel)")

Check = tuple[str, float, str, float]  # what, measured, sign, bar


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bars of what was measured; a least value for rates, a most for shares of time."""
    timed = {(row["case"], row["density"], row["backend"]): row for row in rows if row.get("seconds")}
    checks = [*_of_dense_time(timed), *_rates(timed), *_peers(timed), *_together(timed)]
    return [
        {
            "what": what,
            "measured": value,
            "bar": f"{sign} {bar:g}",
            "met": value >= bar if sign == ">=" else value <= bar,
        }
        for what, value, sign, bar in checks
    ]


def _of_dense_time(timed: dict[tuple[str, float, str], Any]) -> Iterator[Check]:
    for backend, density, most, cases in OF_DENSE_TIME:
        for case in cases:
            if row := timed.get((case, density, backend)):
                what = f"{case}: {backend} at {density:g}, share of SDPA's time"
                yield what, row["of_dense_time"]["median"], "<=", most


def _rates(timed: dict[tuple[str, float, str], Any]) -> Iterator[Check]:
    for case, least in DENSE_RATE.items():
        full, sparse = (timed.get((case, density, "triton")) for density in (1.0, 0.15))
        if full:
            yield f"{case}: our dense mode, TFLOP/s", full["tflops"], ">=", least
        if full and sparse:
            yield f"{case}: rate at 0.15 over our own dense rate", sparse["tflops"] / full["tflops"], ">=", RATE_KEPT


def _peers(timed: dict[tuple[str, float, str], Any]) -> Iterator[Check]:
    for (case, density, backend), mine in timed.items():
        for peer in MATCHED if backend == "triton" and density <= 0.5 else ():
            if theirs := timed.get((case, density, peer)):
                faster = theirs["seconds"]["median"] / mine["seconds"]["median"]
                yield f"{case}: times as fast as {peer} at {density:g}", faster, ">=", 1.0


def _together(timed: dict[tuple[str, float, str], Any]) -> Iterator[Check]:
    names = ("triton + tail + tokens", "draft + probe", "triton + tail")
    mine, before, tiles_only = (timed.get(("wan-14b", 0.2, name)) for name in names)
    if mine and before:
        routing = before["of_dense_time"]["median"]
        faster = 1 / (mine["of_dense_time"]["median"] + routing)
        yield "wan-14b: speed-up at 0.2 with draft, probe, tail, tokens", faster, ">=", 3.0
        yield "wan-14b: draft + probe, share of dense time", routing, "<=", 0.04
    if mine and tiles_only:
        slower = mine["seconds"]["median"] / tiles_only["seconds"]["median"]
        yield "wan-14b: time with single tokens over that of as many in tiles", slower, "<=", 1.1
