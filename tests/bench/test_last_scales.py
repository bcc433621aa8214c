"""The measurement of draft attention at the last scales, on a scale small enough for a test."""

import json

import pytest

from draftdiff.bench import last_scales
from draftdiff.cli import main


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.setattr(last_scales, "CASES", (last_scales.Case("tiny", 16, 40, 32, 64, 24),))
    return lambda *arguments: main(["bench", "var", "attention", "-o", str(tmp_path), *arguments])


def test_every_density_and_history_has_a_row_that_was_checked(bench, tmp_path, capsys):
    assert bench("--device", "cpu", "--heads", "1", "--rounds", "1", "--json") == 0
    payload = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "cpu-var-attention.json").read_text()) == payload
    rows = payload["rows"]
    assert [(row["history"], row["density"]) for row in rows] == [(h, d) for h in (40, 4) for d in (1.0, 0.5, 0.25)]
    for row in rows:
        assert row["full_selection_relative_l2"] < 1e-4
        share, speedup = row["attention_share"], row["speedup"]["median"]
        assert share == pytest.approx(4 * (row["history"] + 256) / (4 * (row["history"] + 256) + 24 * 64))
        assert row["scale_speedup"] == pytest.approx(1 / (1 - share + share / speedup))
    assert rows[0]["limit"] == 1 and rows[2]["limit"] == pytest.approx(1 / (1 - 0.75 * 256 / 296))


def test_attention_that_is_wrong_fails_the_benchmark(bench, monkeypatch, capsys):
    right = last_scales.attend_scale
    monkeypatch.setattr(last_scales, "attend_scale", lambda *call: 1.01 * right(*call))
    assert bench("--device", "cpu", "--heads", "1", "--rounds", "1", "--density", "1") == 1
    assert "tiny, 16x16 differs from dense attention" in capsys.readouterr().err


def test_a_wrong_argument_is_one_line(bench, tmp_path, capsys):
    assert bench("--density", "1.5") == 2
    assert "--density" in capsys.readouterr().err and not list(tmp_path.iterdir())
