"""The rules' words on a plan, one line for each rule of common sense."""

import random

from draftdiff.llm.workloads.travel.feedback import REASONS, all_success, feedback
from draftdiff.llm.workloads.travel.generator import world
from draftdiff.llm.workloads.travel.mutations import mutate
from draftdiff.llm.workloads.travel.rules import COMMONSENSE, Trip


def test_a_plan_without_a_mistake_is_all_success():
    made = world("feedback", 3, "hard", 0)
    assert feedback(Trip(made.query, made.sandbox, made.gold)) == all_success()
    assert all_success().count("success") == len(COMMONSENSE) == 8


def test_a_mistake_is_named_with_its_reason_and_the_other_lines_stay():
    for seed in range(12):
        made = world(f"feedback {seed}", 5, "easy", 0)
        for rule in COMMONSENSE:
            plan = mutate(rule, made, random.Random(seed))
            if plan is None:
                continue
            said = feedback(Trip(made.query, made.sandbox, plan)).splitlines()
            assert said.pop(list(COMMONSENSE).index(rule)) == f"{rule.replace('_', ' ')}: fail, reason: {REASONS[rule]}"
            assert all(line.endswith(": success") for line in said)
