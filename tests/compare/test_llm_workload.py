"""Verdicts on answers to a workload: what was shown, what was not, and when there is none."""

import json

import pytest
import torch

from draftdiff.compare.llm import LlmComparison, MethodResult
from draftdiff.compare.llm_page import page
from draftdiff.compare.llm_workload import Judgement, checked_cases
from draftdiff.errors import UserError
from draftdiff.llm.workloads.drawing.workload import DrawingWorkload
from draftdiff.llm.workloads.named import WORKLOADS, named_workload
from draftdiff.models.llm_methods import Run

DRAWING = DrawingWorkload(compact=True)
CASES = DRAWING.cases(0, 12)
GOLD = [case.gold for case in CASES]
LOSSY = [gold if number % 3 else gold.replace('"page":', '"order":') for number, gold in enumerate(GOLD)]


def judged(**texts: list[str]) -> Judgement:
    return Judgement.of(DRAWING, CASES, texts)


def test_a_method_that_loses_answers_is_worse_and_one_that_gains_is_better():
    made = judged(plain=GOLD, speckv=LOSSY, specpc=GOLD)
    assert made.refusal() is None and made.verdict("speckv") == "worse"
    assert made.difference("speckv").high < 0
    assert made.difference("speckv", "executable").mean == pytest.approx(-100 / 3)
    assert made.verdict("specpc") == "no difference shown" and made.difference("specpc").mean == 0
    assert judged(plain=LOSSY, speckv=GOLD).verdict("speckv") == "better"


def test_one_lost_answer_of_many_shows_nothing():
    assert judged(plain=GOLD, speckv=["", *GOLD[1:]]).verdict("speckv") == "no difference shown"


@pytest.mark.parametrize("said", [[""] * 12, [*GOLD[1:], GOLD[0]], [GOLD[0]] * 12])
def test_whoever_answers_without_having_read_gets_no_verdict(said):
    made = judged(plain=said, speckv=LOSSY)
    assert made.verdict("speckv") == "refused"
    refusal = made.refusal()
    assert refusal.startswith("no verdict on lossy methods: plain decoding scores") and "\n" not in refusal


def test_right_answers_to_other_cases_are_the_floor():
    made = judged(plain=GOLD)
    assert made.floor == pytest.approx(judged(plain=[*GOLD[1:], GOLD[0]]).mean("plain")) and 10 < made.floor < 60


def test_the_floor_of_plans_is_at_the_bottom():
    travel = named_workload("travel", noise=0)
    cases = travel.cases(0, 9)
    made = Judgement.of(travel, cases, {"plain": [case.gold for case in cases]})
    assert made.floor == 0 and made.mean("plain") == 100 and made.refusal() is None


def comparison(sampling: bool = False) -> LlmComparison:
    """Plain decoding, a chain that wrote the same but once, and SpecKV."""
    names = {"plain": GOLD, "chain": GOLD, "speckv": LOSSY}
    results = []
    for name in names:
        runs = [Run(torch.tensor([1, 2, 3]), 0.0, 8) for _ in CASES]
        if name == "chain":
            runs[0].tokens = torch.tensor([1, 2, 4])
        results.append(MethodResult(name, runs, [1.0], [36]))
    prompts = [torch.zeros(1, 4, dtype=torch.long)] * 12
    options = {"do_sample": sampling, "max_new_tokens": 8}
    return LlmComparison("tiny", prompts, 4, options, results, names, {}, judged(**names))


def test_lossless_methods_are_judged_by_their_tokens_and_lossy_ones_by_the_score():
    made = comparison()
    plain, chain, speckv = made.rows()
    assert (plain["score"], plain["difference"], plain["verdict"]) == (100, None, None)
    assert (chain["difference"], chain["verdict"]) == (None, "other tokens in 1 of 12")
    assert speckv["verdict"] == "worse" and speckv["difference"].mean < 0
    assert comparison(sampling=True).rows()[1]["verdict"] == "exact in law"
    stored = json.loads(json.dumps(made.to_dict()))
    assert stored["workload"]["methods"]["speckv"]["differences"]["score"] == stored["methods"][2]["difference"]
    shown = page(made)
    assert "The drawing workload, 12 cases" in shown and "operation chains that are right in all" in shown


def test_a_refusal_is_one_line_below_the_table():
    made = comparison()
    made.judgement = judged(plain=[""] * 12, chain=[""] * 12, speckv=LOSSY)
    assert made.notes()[-1].startswith("no verdict on lossy methods")
    assert made.rows()[2]["verdict"] == "refused"
    made.results = made.results[:2]  # nothing lossy
    assert made.notes() == []


def test_workloads_are_found_by_name_and_need_two_cases():
    assert [named_workload(name).name for name in WORKLOADS] == list(WORKLOADS)
    with pytest.raises(UserError, match="workload must be one of drawing, travel, got 'chess'"):
        named_workload("chess")
    with pytest.raises(UserError, match="cases must be at least 2, got 1"):
        checked_cases(DRAWING, 0, 1)
