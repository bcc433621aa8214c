"""The measurement of draft attention at the last scales, on a scale small enough for a test."""

import json
from pathlib import Path

import pytest

SAMPLES = Path(__file__).resolve().parents[2] / "samples"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SAMPLES))
    import bench_var_attention

    monkeypatch.setattr(bench_var_attention, "CASES", (bench_var_attention.Case("tiny", 16, 40, 32, 64, 24),))
    return bench_var_attention


def test_every_density_and_history_has_a_row_that_was_checked(bench, tmp_path, capsys):
    assert bench.main(["--device", "cpu", "--heads", "1", "--rounds", "1", "-o", str(tmp_path), "--json"]) == 0
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


def test_a_wrong_argument_is_one_line(bench, tmp_path, capsys):
    assert bench.main(["--density", "1.5", "-o", str(tmp_path)]) == 2
    assert "--density" in capsys.readouterr().err and not list(tmp_path.iterdir())
