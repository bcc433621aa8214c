"""The benchmark of tuning: as many pairs as the default, and other prompts to judge by than to tune with."""

import json
from dataclasses import replace

import pytest

from draftdiff.bench import quality
from draftdiff.cli import main


@pytest.fixture(autouse=True)
def few_frames(monkeypatch):
    load = quality.load

    def load_few(*given, **options):
        model = load(*given, **options)
        return replace(model, defaults=model.defaults | {"num_frames": 9})

    monkeypatch.setattr(quality, "load", load_few)


def test_a_tuned_spread_has_the_pairs_of_the_default_and_is_judged_on_other_prompts(tmp_path, capsys):
    options = ["--steps", "2", "--prompts", "1", "--calibrate", "1", "--sparsity", "0.75", "--device", "cpu"]
    assert main(["bench", "tuned", *options, "-o", str(tmp_path), "--json"]) == 0
    payload = json.loads((tmp_path / "cpu-tuned.json").read_text())
    assert json.loads(capsys.readouterr().out) == payload
    judged = {row["prompt"] for row in payload["rows"]}
    assert len(judged) == len(payload["calibrated_with"]) == 1 and not judged & set(payload["calibrated_with"])
    pairs = {row["setting"].split(",")[0]: row["pairs"] for row in payload["summary"]}
    assert list(pairs) == ["default", "first steps denser", "tuned"]
    assert pairs["tuned"] == pytest.approx(pairs["default"], abs=0.05)
    heads = payload["settings"]["tuned, sparsity 0.75"]["sparsity"]["heads"]
    assert len(heads) == 2 and len(heads[0]) == 6


def test_prompts_that_are_all_tuned_with_leave_none_to_judge_by(tmp_path, capsys):
    command = ["bench", "tuned", "--prompt", "a red circle", "--calibrate", "1", "--device", "cpu", "-o", str(tmp_path)]
    assert main(command) == 2
    assert "--calibrate 1 leaves no --prompt to judge by" in capsys.readouterr().err
