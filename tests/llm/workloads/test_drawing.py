"""The drawing-revision workload: its tasks, what an answer may be, and how it is scored."""

import json
import random
from collections import Counter

import pytest

from draftdiff.llm.workloads.drawing.calls import NotExecutable, chains, parse
from draftdiff.llm.workloads.drawing.scoring import RATIOS, score
from draftdiff.llm.workloads.drawing.tasks import CONTROLLERS, KINDS, LEVELS, task
from draftdiff.llm.workloads.drawing.tools import TOOLS, Ref
from draftdiff.llm.workloads.drawing.wording import PHRASES
from draftdiff.llm.workloads.drawing.workload import EXAMPLE_CALLS, DrawingWorkload

WORK = DrawingWorkload(compact=True)
CASES = WORK.cases(3, 480)
FULL = dict.fromkeys(("score", "executable", *RATIOS), 100.0)


def a_case(kind: str, **wanted: bool):
    """A case of that type under these controllers, all others off."""
    on = dict.fromkeys(CONTROLLERS, False) | wanted
    return next(
        case
        for seed in range(40)
        for case in WORK.cases(seed, 480)
        if case.truth.kind == kind and case.truth.controllers == on
    )


def changed(case, edit) -> dict:
    """The score of the gold answer after an edit of its calls."""
    calls = json.loads(case.gold)
    return WORK.score(case, json.dumps(edit(calls) or calls))


def test_there_are_46_tools_which_take_at_most_one_result_and_all_are_used():
    assert len(TOOLS) == 46
    given = {tool.gives for tool in TOOLS.values()}
    for tool in TOOLS.values():
        taken = [kind.kind for kind in tool.parameters.values() if isinstance(kind, Ref)]
        assert len(taken) <= 1 and set(taken) <= given
    assert {call["tool"] for case in WORK.cases(0, 1200) for call in json.loads(case.gold)} == set(TOOLS)
    assert set(PHRASES) == {tool for kind in KINDS.values() for tool in kind.changes}


def test_gold_answers_have_full_marks_in_all_types_and_under_all_controllers():
    assert {case.truth.kind for case in CASES} == set(KINDS)
    assert all(Counter(case.truth.controllers[name] for case in CASES)[True] > 150 for name in CONTROLLERS)
    for case in CASES:
        assert WORK.score(case, case.gold) == FULL, case.prompt
        assert WORK.score(case, f"Sure:\n{case.gold}\nDone.") == FULL


def test_the_same_seed_gives_the_same_cases_and_another_others():
    assert WORK.cases(3, 12) == CASES[:12] and WORK.stream(1, 30)[:8] == WORK.stream(1, 8)
    assert not {case.gold for case in WORK.cases(4, 48)} & {case.gold for case in CASES[:48]}


def test_instructions_say_all_that_precise_answers_need():
    for case in CASES:
        said = case.prompt.split("instruction: ")[1]
        for place in case.truth.places:
            assert all(str(place.said(level)) in said for level in LEVELS if level != place.missing), said
            for change in place.changes:
                named = {key: value for key, value in change.values.items() if key not in change.vague}
                assert all(str(value) in said for value in named.values()), (said, named)


def test_whole_prompts_hold_the_policy_and_every_tool_that_is_due():
    for case in DrawingWorkload().cases(5, 36):
        assert "do not guess" in case.prompt and "report_missing" in case.prompt
        assert all(f"{call['tool']}(" in case.prompt for call in json.loads(case.gold))


def test_the_example_of_the_prompt_is_an_answer():
    found, idle = chains(parse(json.dumps(EXAMPLE_CALLS)))
    assert len(found) == 2 and idle == 0


def test_a_wrong_value_costs_its_argument_and_its_plan_alone():
    case = a_case("map_vector")

    def edit(calls):
        calls[-2][next(key for key in calls[-2] if key in ("right", "degrees", "percent"))] += 1

    made = changed(case, edit)
    assert made["arguments"] < 100 and made["plans"] == 50
    assert all(made[name] == 100 for name in ("executable", "variables", "calls", "tools", "sequences"))
    assert made["score"] == pytest.approx(30 + 70 * (400 + made["arguments"] + 50) / 600)


def test_a_value_that_no_tool_allows_is_no_valid_call():
    case = a_case("refresh_text")
    made = changed(case, lambda calls: calls[1].update(page=1000))
    assert made["calls"] < 100 and made["tools"] == 100


@pytest.mark.parametrize("kind", ["refresh_text", "map_table", "add_vector"])
def test_a_value_left_open_may_be_any_that_is_allowed(kind):
    case = a_case(kind, vague=True)
    literals = TOOLS[case.truth.places[0].changes[0].tool].literals
    key = next(iter(case.truth.places[0].changes[0].vague))
    other = literals[key].names[-1] if hasattr(literals[key], "names") else literals[key].most
    assert changed(case, lambda calls: calls[-2].update({key: other}))["score"] == 100
    assert changed(case, lambda calls: calls[-2].update({key: 10**6}))["score"] < 100


def test_the_handle_of_another_mark_is_a_variable_that_was_not_transferred():
    case = a_case("delete_vector", several_objects=True)
    marks = [number for number, call in enumerate(json.loads(case.gold), start=1) if call["tool"] == "pick_mark"]

    def edit(calls):
        for call in calls:
            if call.get("mark") == f"${marks[1]}":
                call["mark"] = f"${marks[0]}"

    made = changed(case, edit)
    assert made["variables"] < 100 and made["plans"] < 100 and made["sequences"] == 100


def test_surplus_is_subtracted_and_omission_is_not_made_up():
    case = a_case("delete_vector")
    assert changed(case, lambda calls: [*calls, {**calls[0], "path": "other.pdf"}])["tools"] < 100  # idle
    assert changed(case, lambda calls: [*calls, calls[-1]])["plans"] == 50  # saved twice
    without = changed(case, lambda calls: calls[:-1])  # not saved
    assert without["plans"] == 50 and without["sequences"] == 50 and without["executable"] == 100


@pytest.mark.parametrize("level", LEVELS)
def test_a_missing_level_is_to_be_reported_and_not_guessed(level):
    chance = random.Random(level)
    while True:
        made = task("refresh_vector", chance)
        if [place.missing for place in made.places] == [level]:
            break
    truth, report = made.truth, json.loads(made.answer)
    assert [call["tool"] for call in report] == ["report_missing"] and report[0][level] == "missing"
    guess = 7 if level in ("page", "order") else "bridge_10.pdf" if level == "file" else "lines covered"
    guessed = score(truth, json.dumps([{**report[0], level: guess}]))
    assert guessed["plans"] == 0 and guessed["tools"] == 100
    acted = score(truth, json.dumps([{"tool": "open_file", "path": "a.pdf"}, {"tool": "save_file", "file": "$1"}]))
    assert acted["score"] == 30 and acted["executable"] == 100
    if level != "base":  # a text that is nearly the same is the same
        base = report[0]["base"]
        assert score(truth, json.dumps([{**report[0], "base": f"{base}s"}]))["score"] == 100


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no list of calls"),
        ("[]", "makes no call"),
        ("[" * 100_000, "no JSON"),
        ('[{"tool":"open_file","path":NaN}]', "no JSON"),
        ('[{"tool":"os.remove","path":"a"}]', "names no tool"),
        ('[{"tool":["open_file"]}]', "names no tool"),
        ('["open_file"]', "names no tool"),
        ('[{"tool":"open_file"}]', "takes path"),
        ('[{"tool":"open_file","path":"a","mode":"w"}]', "takes path"),
        ('[{"tool":"save_file","file":"$1"}]', "of no earlier call"),
        ('[{"tool":"open_file","path":"a"},{"tool":"save_file","file":"$2"}]', "of no earlier call"),
        ('[{"tool":"open_file","path":"a"},{"tool":"save_file","file":"$²"}]', "of no earlier call"),
        ('[{"tool":"open_file","path":"a"},{"tool":"save_file","file":1}]', "of no earlier call"),
        ('[{"tool":"open_file","path":"a"},{"tool":"pick_mark","marks":"$1","order":1}]', "takes a marks, got file"),
        (json.dumps([{"tool": "open_file", "path": "a"}] * 257), "may make 256 calls"),
        ("__import__('os').system('touch x')", "no list of calls"),
    ],
)
def test_what_could_not_run_scores_nothing_and_says_why_in_one_line(text, why):
    with pytest.raises(NotExecutable, match=why) as error:
        parse(text)
    assert "\n" not in str(error.value)
    assert set(WORK.score(CASES[0], text).values()) == {0.0}


def test_any_cut_of_an_answer_is_scored():
    for case in CASES[:12]:
        points = [WORK.score(case, case.gold[:length])["score"] for length in range(0, len(case.gold), 7)]
        assert set(points) == {0.0}


def test_the_comprehensive_score_takes_off_a_twelfth_of_what_the_worst_type_lacks():
    cases = WORK.cases(0, 24)
    scores = [WORK.score(case, "" if case.truth.kind == "add_text" else case.gold) for case in cases]
    made = WORK.summary(cases, scores)
    assert made["average"] == pytest.approx(100 * 11 / 12)
    assert made["comprehensive"] == pytest.approx(100 * 11 / 12 - 100 / 12)


def test_a_stream_stays_with_few_files_and_two_types_for_a_block():
    cases = WORK.stream(2, 96, block=24)
    for start in range(0, 96, 24):
        block = cases[start : start + 24]
        assert len({case.truth.kind for case in block}) == 2
        assert len({place.file for case in block for place in case.truth.places}) <= 2
    assert len({case.truth.kind for case in cases}) > 3
    assert all(WORK.score(case, case.gold)["score"] == 100 for case in cases)
