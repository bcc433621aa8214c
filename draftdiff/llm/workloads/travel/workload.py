"""The travel-planning workload: prompts, cases, scores by rule, and their rates.

After TravelPlanner (arXiv 2402.01622), with tables and wishes of our own: its figures are not that benchmark's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from statistics import fmean

from draftdiff.errors import UserError
from draftdiff.llm.workloads.base import Case, Score, Workload
from draftdiff.llm.workloads.travel.generator import DAYS, LEVELS, World, world
from draftdiff.llm.workloads.travel.plan import NoPlan, parse, written
from draftdiff.llm.workloads.travel.rules import COMMONSENSE, HARD, Trip, grounded, verdicts
from draftdiff.llm.workloads.travel.sandbox import Query, Sandbox
from draftdiff.llm.workloads.travel.scrubber import constraints, scrub
from draftdiff.llm.workloads.travel.tables import tables

RULES = """You plan trips from tables. Answer with one JSON list, one entry for each day, and nothing else:
{"day":1,"current_city":"from A to B","transportation":"Flight F123, from A to B","breakfast":"-","lunch":"-",\
"dinner":"Name, B","attraction":"Name, B","accommodation":"Name, B"}
Write "-" for nothing, "A" for a day in one city, "Taxi, from A to B" or "Self-driving, from A to B" for roads.
Start at home and come back home on the last day; visit each city once and as many as asked for.
Take everything from the tables, in the city where the day is. No restaurant and no attraction twice.
On days without travel name three meals and an attraction; name an accommodation for every night and stay there at \
least as long as it demands. Whoever drives takes neither flight nor taxi.
A car has 5 seats, a taxi 4; prices of roads are for one car, of flights for one seat, of accommodations for one room \
and night."""


class TravelWorkload(Workload):
    """noise: from 0 to 1, of further cities, rows and columns; 1 makes prompts of about 10,000 tokens.  compact: three
    days in one city, small tables without noise and no rules, for a model that was trained on such."""

    name = "travel"
    headline = "grounded"
    metrics = {  # noqa: RUF012
        "grounded": "ways, meals, sights and nights that the days need and that name something in the tables",
        "rules": "rules that hold, of the eight of common sense and those that the wish states",
        "delivered": "a plan with the right number of days",
        "commonsense_micro": "rules of common sense that hold",
        "commonsense_macro": "all of them hold",
        "hard_micro": "stated rules that hold, none in a plan with a hole or an invention",
        "hard_macro": "all of them hold",
        "final": "everything holds",
        "hallucination": "a delivered plan names what is not in the tables",
        **{name: f"the rule {name.replace('_', ' ')} holds" for name in (*COMMONSENSE, *HARD)},
    }

    def __init__(self, noise: float = 0.3, compact: bool = False) -> None:
        if not 0 <= noise <= 1:
            raise UserError(f"noise must be from 0 to 1, got {noise}")
        self.noise, self.compact = noise, compact
        self.tokens = 256 if compact else 1024

    def cases(self, seed: int, n: int) -> list[Case]:
        """Three levels of wishes in turn; in whole prompts each for three, five and seven days."""
        kinds = list(product(LEVELS, DAYS[:1] if self.compact else DAYS))
        found = []
        for number in range(n):
            level, days = kinds[number % len(kinds)]
            seeded = f"travel {seed} {number}"
            made = world(seeded, days, level, 0, rows=5) if self.compact else world(seeded, days, level, self.noise)
            found.append(Case(self._prompt(made, made.sandbox), written(made.gold), made))
        return found

    def _prompt(self, made: World, sandbox: Sandbox) -> str:
        asked = f"{reference(made.query, sandbox)}\nplan: "
        return asked if self.compact else f"{RULES}\n\n{asked}"

    def scrubbed(self, case: Case) -> Case:
        """The same case with tables of what can serve the wish."""
        made = case.truth
        return replace(case, prompt=self._prompt(made, scrub(made.sandbox, constraints(made.query.in_words()))))

    def score(self, case: Case, text: str) -> Score:
        if not isinstance(case.truth, World):
            raise UserError(f"case must be one of the travel workload, got {type(case.truth).__name__}")
        made = case.truth
        try:
            trip = Trip(made.query, made.sandbox, parse(text, made.query.days))
        except NoPlan:
            due = verdicts(Trip(made.query, made.sandbox, made.gold))
            return _figures({name: None if holds is None else False for name, holds in due.items()}, None)
        return _figures(verdicts(trip), 100 * grounded(trip))

    def summary(self, cases: Sequence[Case], scores: Sequence[Score]) -> dict[str, float]:
        """Rates over all plans; micro rates are of all rules together."""
        found = {}
        for name in ("delivered", "commonsense_macro", "hard_macro", "final", "hallucination"):
            known = [value for one in scores if (value := one[name]) is not None]
            found[name] = fmean(known) if known else 0.0
        for name, rules in (("commonsense_micro", COMMONSENSE), ("hard_micro", HARD)):
            found[name] = fmean([value for one in scores for rule in rules if (value := one[rule]) is not None])
        return found


def reference(query: Query, sandbox: Sandbox) -> str:
    """The tables and the wish."""
    return f"{tables(sandbox, query)}\n\n{query.in_words()}"


def _figures(holds: dict[str, bool | None], grounded: float | None) -> Score:
    """grounded: in per cent, None of a text that is no plan."""
    delivered = grounded is not None
    groups = {name: [holds[rule] for rule in rules if holds[rule] is not None]
              for name, rules in (("commonsense", COMMONSENSE), ("hard", HARD))}  # fmt: skip
    made: Score = {"grounded": grounded or 0.0, "delivered": 100.0 * delivered}
    for name, group in groups.items():
        made[f"{name}_micro"] = 100 * sum(map(bool, group)) / len(group)
        made[f"{name}_macro"] = 100.0 * all(group)
    both = [*groups["commonsense"], *groups["hard"]]
    made["rules"] = 100 * sum(map(bool, both)) / len(both)
    made["final"] = 100.0 * all(both)
    made["hallucination"] = 100.0 * (not holds["within_sandbox"]) if delivered else None
    return made | {name: None if value is None else 100.0 * value for name, value in holds.items()}
