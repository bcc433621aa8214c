"""The benchmark of rules and schedules, on the embedded model with two steps, and what it reckons."""

import json
from dataclasses import replace

import pytest

from draftdiff.bench import quality
from draftdiff.bench.quality import RULES, SCHEDULES, Schedule, summary
from draftdiff.cli import main
from draftdiff.video.config import DraftAttentionConfig


def work(config, steps):
    """Of a run, in dense steps."""
    sparse = config.sparse_steps(steps)
    return steps - len(sparse) + sum(float(config.budget.density(1, 1, i / len(sparse))) for i in range(len(sparse)))


@pytest.mark.parametrize("steps", [6, 10, 50])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_has_the_work_it_was_given_or_none(name, steps):
    schedule, given = SCHEDULES[name], work(DraftAttentionConfig(0.75), steps)
    config = schedule.config(given, steps, {})
    if config is None:
        assert schedule.dense_steps + schedule.dense_end >= given or schedule.weights
    else:
        assert work(config, steps) == pytest.approx(given)
        assert len(config.sparse_steps(steps)) == steps - schedule.dense_steps - schedule.dense_end


def test_a_schedule_that_would_need_more_than_all_is_left_out():
    assert Schedule(3).config(2.5, 4, {}) is None
    assert Schedule(0, weights=(9, 1, 1)).config(2.5, 3, {}) is None


@pytest.mark.parametrize("fields", RULES.values(), ids=RULES)
def test_every_rule_of_the_table_is_a_config(fields):
    assert DraftAttentionConfig(0.75, **fields)


@pytest.mark.parametrize(
    ("name", "steps", "sparsity"),
    [("first steps denser", 9, (0.4, 0.7, 0.7)), ("falling", 10, (0.2, 0.6, 0.7, 0.75, 0.75))],
)
def test_a_schedule_is_what_a_user_writes_for_it(name, steps, sparsity):
    wanted = DraftAttentionConfig(sparsity, dense_steps=0)
    made = SCHEDULES[name].config(work(wanted, steps), steps, {})
    assert made is not None
    assert made.rule.single == pytest.approx(wanted.rule.single)  # which hangs on the mean, not on the weights
    assert made.budget.sparsity == pytest.approx(wanted.budget.sparsity)
    assert made.budget.steps == pytest.approx(wanted.budget.steps)


def test_a_summary_is_over_the_prompts_of_a_setting():
    common = {
        "vmaf": None,
        "lpips": 0.1,
        "ssim": 0.9,
        "density": 0.3,
        "pairs": 0.4,
        "seconds": [1.0],
        "dense_seconds": [2.0],
    }
    rows = [{"setting": "a", "psnr": p, "right": r, **common} for p, r in ((30.0, True), (36.0, False), (33.0, True))]
    (one,) = summary(rows)
    assert one["psnr"] == {"median": 33.0, "min": 30.0, "max": 36.0}
    assert one["psnr_mean"] == pytest.approx(33)
    assert one["right"] == pytest.approx(2 / 3)
    assert one["pairs"] == pytest.approx(0.4)
    assert one["vmaf"] is None and one["speedup"]["median"] == 2


def test_the_command_writes_a_row_for_every_prompt_and_setting_and_draws_them(tmp_path, capsys, monkeypatch):
    load = quality.load

    def load_few_frames(*given, **options):
        model = load(*given, **options)
        return replace(model, defaults=model.defaults | {"num_frames": 9})

    monkeypatch.setattr(quality, "load", load_few_frames)
    rules = ["mass", "error, tokens 1/4"]
    options = ["--steps", "2", "--prompts", "2", "--sparsity", "0.75", "--device", "cpu", "-o", str(tmp_path)]
    assert main(["bench", "quality", "--rules", *rules, *options, "--json"]) == 0
    payload = json.loads((tmp_path / "cpu-quality.json").read_text())
    assert json.loads(capsys.readouterr().out) == payload
    assert payload["complete"] and payload["steps"] == 2
    names = [f"{rule}, sparsity 0.75" for rule in rules]
    assert list(payload["settings"]) == [row["setting"] for row in payload["summary"]] == names
    assert [(row["setting"], row["seed"]) for row in payload["rows"]] == [(n, s) for s in (0, 1) for n in names]
    assert all(10 < row["psnr"] < 99 and 0.2 < row["density"] < 0.4 for row in payload["rows"])
    assert (tmp_path / "cpu-quality.png").stat().st_size > 10_000


def test_wrong_options_are_one_line(tmp_path, capsys):
    for command, message in (
        (["quality", "--rules", "best"], "--rules must be among mass"),
        (["quality", "--sparsity", "1"], "must be in [0, 1)"),
        (["schedules", "--model", str(tmp_path)], "--model needs --prompt"),
    ):
        assert main(["bench", *command, "--device", "cpu", "-o", str(tmp_path)]) == 2
        assert message in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
