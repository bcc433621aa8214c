"""The samples on workloads: a stream, curves over budgets, feedback-aware tuning, on sizes small enough for a test."""

import importlib
import json
from pathlib import Path

import pytest

from draftdiff.errors import UserError

SAMPLES = Path(__file__).resolve().parents[2] / "samples" / "llm"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SAMPLES))
    return importlib.import_module


def test_drafters_are_measured_over_a_stream(script, tmp_path, capsys):
    files = ["--json", str(tmp_path / "stream.json"), "--plot", str(tmp_path / "stream.png")]
    script("drawing_stream").main(["--cases", "4", "--block", "2", *files])
    rows = json.loads((tmp_path / "stream.json").read_text())["rows"]
    assert [row["drafter"] for row in rows] == [
        "n-grams, kept", "n-grams, anew", "OmniDraft, learning", "OmniDraft, anew",
    ]  # fmt: skip
    assert all(len(row["tokens_per_forward"]) == 2 and min(row["tokens_per_forward"]) >= 1 for row in rows)
    assert rows[0]["tokens_per_forward"][1] > rows[1]["tokens_per_forward"][1]  # what was seen helps
    assert [row["gain"] is None for row in rows] == [False, True, False, True]
    assert (tmp_path / "stream.png").read_bytes().startswith(b"\x89PNG")
    assert "n-grams, kept" in capsys.readouterr().out


def test_the_score_is_measured_over_budgets(script, tmp_path, capsys):
    files = ["--json", str(tmp_path / "curves.json"), "--plot", str(tmp_path / "curves.png")]
    script("workload_curves").main(["--workload", "drawing", "--cases", "3", "--capacity", "40", "400", *files])
    made = json.loads((tmp_path / "curves.json").read_text())
    assert len(made["rows"]) == 7 and made["headline"] == "score"
    for row in made["rows"][1:]:
        if row["name"].endswith(" 400"):  # nothing is cut
            assert row["difference"]["mean"] == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "difference from plain" in capsys.readouterr().out


def test_on_travel_the_scrubber_stands_beside_specpc_at_as_many_tokens_and_the_floor_is_told(script, tmp_path, capsys):
    given = ["--workload", "travel", "--cases", "2", "--capacity", "64", "--tokens", "4"]
    script("workload_curves").main([*given, "--json", str(tmp_path / "curves.json")])
    made = json.loads((tmp_path / "curves.json").read_text())
    rows = {row["name"]: row for row in made["rows"]}
    assert rows["scrubber"]["kept"] == rows["specpc as the scrubber"]["kept"] < rows["plain"]["kept"]
    assert made["refusal"].startswith("no verdict on lossy methods") and made["refusal"] in capsys.readouterr().out
    assert {row["verdict"] for row in made["rows"][1:]} == {"refused"}


def test_feedback_aware_tuning_runs_both_arms_for_equal_steps(script, tmp_path, monkeypatch):
    study = script("feedback_tuning")
    monkeypatch.setattr(study, "PLAN_TOKENS", 4)
    few = ["--planner-steps", "1", "--steps", "1", "--wishes", "2", "--samples", "1", "--judged", "2"]
    study.main([*few, "--work", str(tmp_path), "--json", str(tmp_path / "faft.json")])
    made = json.loads((tmp_path / "faft.json").read_text())
    assert [row["metric"] for row in made["rows"]] == list(study.JUDGED)
    assert all(set(row) == {"metric", "planner", "SFT", "FAFT", "gain"} for row in made["rows"])


def test_rows_of_feedback_aware_tuning_are_reference_wish_feedback_and_plan(script):
    study = script("feedback_tuning")
    (made,) = study.worlds("test", 1)
    row = study.Row(made, "[]", study.all_success())
    places = [row.prompt.index(part) for part in ("Restaurants in", "Please plan a trip", "route: success", "plan: ")]
    assert places == sorted(places) and row.prompt.endswith("plan: ")


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("drawing_stream", ["--cases", "1"], "argument --cases: must be a whole number from 2 on, got '1'"),
        ("drawing_stream", ["--plot", "x.pdf"], "argument --plot: output 'x.pdf' must end in .png"),
        ("workload_curves", ["--workload", "chess"], "argument --workload: invalid choice: 'chess'"),
        (
            "workload_curves",
            ["--workload", "travel", "--noise", "0.5"],
            "noise goes with the travel workload and a model of your own",
        ),
        (
            "workload_curves",
            ["--workload", "travel", "--model", "no/such/folder"],
            "model 'no/such/folder' cannot be loaded",
        ),
        ("feedback_tuning", ["--steps", "0"], "argument --steps: must be a whole number from 1 on, got '0'"),
    ],
)
def test_a_mistake_is_one_line(name, given, message, script):
    with pytest.raises(UserError, match=message) as error:
        script(name).main(given)
    assert "\n" not in str(error.value)
