"""The scripts that measure verifiers and the decoding loop, on little."""

import importlib
import json
from pathlib import Path

import pytest

SAMPLES = Path(__file__).resolve().parents[2] / "samples" / "llm"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SAMPLES))
    return importlib.import_module


def test_no_verifier_is_above_the_optimum_on_the_pair(script, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = ["--json", str(tmp_path / "gap.json"), "--plot", str(tmp_path / "gap.png")]
    few = ["--places", "2", "--temperatures", "0.5", "1", "--drafts", "1", "2", "--n", "2"]
    script("multi_draft_gap").main([*few, *files])
    rows = json.loads((tmp_path / "gap.json").read_text())["rows"]
    assert len(rows) == 3 * 3
    for row in rows:
        assert all(row[name] <= row["optimum"] + 1e-6 for name in ("rrs", "k_seq", "greedy", "match") if name in row)
    assert (tmp_path / "gap.png").stat().st_size > 10_000
    assert "without_replacement" in capsys.readouterr().out


def test_the_loop_is_measured_beside_its_bars(script, tmp_path, capsys):
    script("bench_loop").main(["--repeat", "1", "--json", str(tmp_path / "loop.json")])
    rows = json.loads((tmp_path / "loop.json").read_text())["rows"]
    assert {row["bar"] for row in rows} == {1.0, 2.0, 50.0}
    assert all(row["ms"]["median"] > 0 for row in rows)
    assert "n-gram proposal" in capsys.readouterr().out


def test_a_pair_that_does_not_belong_together_is_one_line(script, tmp_path):
    with pytest.raises(SystemExit, match=r"multi_draft_gap: --model and --draft come together"):
        script("multi_draft_gap").main(["--model", str(tmp_path)])
