"""What the rules say of a plan in words, as feedback-aware fine-tuning reads it (FAFT, arXiv 2408.06318).

One line for each of the eight rules of common sense: "success", or "fail, reason: ..." with what the rule is about.
"""

from __future__ import annotations

from draftdiff.llm.workloads.travel.rules import COMMONSENSE, Trip, verdicts

REASONS: dict[str, str] = {
    "route": "the way does not lead from home through the cities asked for and back",
    "diverse_restaurants": "a restaurant comes twice",
    "diverse_attractions": "an attraction comes twice",
    "minimum_nights": "a stay is shorter than its house demands",
    "transport_without_conflict": "a car is driven and left behind",
    "within_current_city": "something is in another city than the day",
    "within_sandbox": "something is not in the tables",
    "complete": "something is not named that must be",
}


def feedback(trip: Trip) -> str:
    """The eight lines for a plan."""
    holds = verdicts(trip)
    return _lines({rule: bool(holds[rule]) for rule in COMMONSENSE})


def all_success() -> str:
    """The eight lines that a plan is asked for with."""
    return _lines(dict.fromkeys(COMMONSENSE, True))


def _lines(holds: dict[str, bool]) -> str:
    said = {rule: "success" if held else f"fail, reason: {REASONS[rule]}" for rule, held in holds.items()}
    return "\n".join(f"{rule.replace('_', ' ')}: {verdict}" for rule, verdict in said.items())
