"""The travel-planning workload: every rule against one mistake, what a wish leaves out, and tables that shrink."""

import json
import random
from dataclasses import replace

import pytest

from draftdiff.errors import UserError
from draftdiff.llm.workloads.travel.generator import DAYS, LEVELS, world
from draftdiff.llm.workloads.travel.mutations import MUTATIONS, mutate
from draftdiff.llm.workloads.travel.plan import NoPlan, parse, with_day, written
from draftdiff.llm.workloads.travel.rules import COMMONSENSE, HARD, Trip, verdicts
from draftdiff.llm.workloads.travel.sandbox import HOUSE_RULES, ROOM_WISHES, SELF_DRIVING
from draftdiff.llm.workloads.travel.scrubber import constraints, scrub
from draftdiff.llm.workloads.travel.solver import solve
from draftdiff.llm.workloads.travel.tables import tables
from draftdiff.llm.workloads.travel.workload import TravelWorkload

WORLDS = [world(f"test {n}", DAYS[n % 3], LEVELS[n // 3 % 3], 0.5 * (n % 2)) for n in range(108)]
RULES = (*COMMONSENSE, *HARD)


def broken(made, plan) -> set[str]:
    return {name for name, holds in verdicts(Trip(made.query, made.sandbox, plan)).items() if holds is False}


def test_gold_plans_pass_at_all_lengths_and_levels():
    assert {(len(made.gold), made.level) for made in WORLDS} == {(d, level) for d in DAYS for level in LEVELS}
    for made in WORLDS:
        assert not broken(made, made.gold)
        stated = [rule for rule, holds in verdicts(Trip(made.query, made.sandbox, made.gold)).items() if holds is None]
        assert 4 - len(stated) == {"easy": 0, "medium": 1, "hard": 3}[made.level]


@pytest.mark.parametrize("rule", RULES)
def test_a_mistake_breaks_its_rule_and_no_other(rule):
    count = 0
    for number, made in enumerate(WORLDS):
        plan = mutate(rule, made, random.Random(number))
        if plan is None:  # the wish leaves no such mistake
            query = made.query
            left_out = {
                "room_rule": query.rule is None,
                "room_type": query.room is None,
                "cuisine": not query.cuisines,
                "transport": query.without is None,
                "transport_without_conflict": query.without == SELF_DRIVING,
            }
            assert left_out[rule]
            continue
        found = broken(made, plan)
        if rule in ("within_sandbox", "complete"):  # whatever is stated counts for nothing then
            found -= set(HARD)
        assert found == {rule}, made.query
        count += 1
    assert count >= 25 and set(MUTATIONS) == set(RULES)


def test_a_plan_with_a_hole_or_an_invention_meets_no_wish():
    for rule in ("within_sandbox", "complete"):
        for made in WORLDS[:18]:
            found = verdicts(Trip(made.query, made.sandbox, mutate(rule, made, random.Random(0))))
            assert {found[name] for name in HARD} <= {None, False}


def test_a_jump_a_second_visit_and_a_city_too_few_are_no_route():
    made = next(one for one in WORLDS if len(one.gold) == 7)
    first, second = made.gold[1].current_city, made.gold[3].current_city
    assert "route" in broken(made, with_day(made.gold, 3, current_city=first))
    assert "route" in broken(made, with_day(made.gold, 0, current_city=second))
    home = made.query.origin
    back = with_day(made.gold, 2, current_city=f"from {first} to {home}")
    assert "route" in broken(made, with_day(back, 3, current_city=home))


def test_costs_are_by_seats_rooms_and_heads():
    made = WORLDS[6]
    two, nine = (Trip(replace(made.query, people=people), made.sandbox, made.gold).cost for people in (2, 9))
    trip = Trip(made.query, made.sandbox, made.gold)
    meals = sum(meal.cost for _, meal in trip.meals)
    houses = {people: sum(stay.price * -(-people // stay.people) for _, stay in trip.nights) for people in (2, 9)}
    ways = {people: sum(leg.price * -(-people // {"Self-driving": 5, "Taxi": 4, "Flight": 1}[leg.mode])
                        for _, leg in trip.legs) for people in (2, 9)}  # fmt: skip
    assert two == 2 * meals + houses[2] + ways[2] and nine == 9 * meals + houses[9] + ways[9]


def test_all_wishes_come_up_and_their_words_say_all_of_them():
    assert {made.query.rule for made in WORLDS} == {None, *HOUSE_RULES}
    assert {made.query.room for made in WORLDS} == {None, *ROOM_WISHES}
    for made in WORLDS:
        assert constraints(made.query.in_words()) == made.query
    with pytest.raises(UserError, match="states no trip"):
        constraints("a nice weekend somewhere")


def test_the_scrubber_leaves_what_a_plan_needs_and_drops_what_cannot_serve():
    for made in WORLDS:
        query = made.query
        less = scrub(made.sandbox, query)
        assert not verdicts(Trip(query, less, made.gold)).keys() - set(RULES)
        assert False not in verdicts(Trip(query, less, made.gold)).values()
        assert solve(less, query) == solve(made.sandbox, query) is not None
        assert all(query.allows_room(stay.room) and query.rule not in stay.forbids for stay in less.stays)
        assert query.without not in {leg.mode for leg in less.legs}
        assert {row.city for row in less.restaurants} <= set(less.region) and not less.columns
        for trap in ("budget", "room_rule", "room_type"):
            plan = mutate(trap, made, random.Random(1))
            assert plan is None or "within_sandbox" in broken(replace(made, sandbox=less), plan)
    noisy = [made for made in WORLDS if made.sandbox.columns]
    shares = [len(tables(scrub(m.sandbox, m.query), m.query)) / len(tables(m.sandbox, m.query)) for m in noisy]
    assert max(shares) < 0.6


def test_everything_of_the_sandbox_stands_in_its_tables():
    for made in WORLDS[:12]:
        text = tables(made.sandbox, made.query)
        for row in (*made.sandbox.restaurants, *made.sandbox.stays, *made.sandbox.sights):
            assert row.name in text and row.city in text and all(value in text for value in row.extra)
        assert all(leg.number is None or leg.number in text for leg in made.sandbox.legs)


def test_noise_makes_prompts_of_ten_thousand_tokens():
    case = next(case for case in TravelWorkload(noise=1).cases(0, 3) if len(case.truth.gold) == 7)
    assert 25_000 < len(case.prompt) < 45_000  # at three to four characters a token of such text
    with pytest.raises(UserError, match="noise must be from 0 to 1, got 2"):
        TravelWorkload(noise=2)


def test_scores_are_rates_of_rules_and_leave_out_what_is_not_stated():
    work = TravelWorkload(noise=0)
    cases = work.cases(2, 27)
    gold = [work.score(case, f"Here it is: {case.gold} Enjoy.") for case in cases]
    assert all(one["final"] == one["rules"] == 100 and one["hallucination"] == 0 for one in gold)
    assert work.summary(cases, gold) == {
        **dict.fromkeys(("delivered", "commonsense_macro", "hard_macro", "final"), 100),
        "hallucination": 0, "commonsense_micro": 100, "hard_micro": 100,
    }  # fmt: skip
    lost = [work.score(case, "I cannot.") for case in cases]
    assert all(one["rules"] == one["delivered"] == 0 and one["hallucination"] is None for one in lost)
    assert all((a[rule] is None) == (b[rule] is None) for a, b in zip(gold, lost) for rule in RULES)
    made = [work.score(case, written(mutate("within_sandbox", case.truth, random.Random(0)))) for case in cases]
    rates = work.summary(cases, made)
    assert rates["commonsense_micro"] == pytest.approx(87.5) and rates["hallucination"] == 100
    assert rates["hard_micro"] == rates["final"] == 0
    assert work.cases(2, 3) == cases[:3] and work.cases(3, 1)[0].gold != cases[0].gold


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no list of days"),
        ("[" * 100_000, "no JSON"),
        ("[1]", "1 days instead of 3"),
        ("[1,2,3]", "a day is '1'"),
        ('[{"dinner":3},{},{}]', "dinner is '3'"),
    ],
)
def test_what_is_no_plan_says_why_in_one_line(text, why):
    with pytest.raises(NoPlan, match=why) as error:
        parse(text, 3)
    assert "\n" not in str(error.value)


def test_any_day_may_be_nonsense_and_is_judged():
    made = WORLDS[0]
    days = json.loads(written(made.gold))
    for value in ("-", "", ", ", "from  to ", ";", "Taxi, from to", "a, b, c"):
        plan = parse(json.dumps([dict.fromkeys(days[0], value) | {"day": 1}, *days[1:]]), 3)
        assert broken(made, plan)
