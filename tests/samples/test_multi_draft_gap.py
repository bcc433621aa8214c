"""The recipe that measures verifiers, on little."""

import importlib
import json
from pathlib import Path

import pytest

from draftdiff.errors import UserError

SAMPLES = Path(__file__).resolve().parents[2] / "samples" / "llm"


@pytest.fixture
def gap(monkeypatch):
    monkeypatch.syspath_prepend(str(SAMPLES))
    return importlib.import_module("multi_draft_gap")


def test_no_verifier_is_above_the_optimum_on_the_pair(gap, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = ["--json", str(tmp_path / "gap.json"), "--plot", str(tmp_path / "gap.png")]
    few = ["--places", "2", "--temperatures", "0.5", "1", "--drafts", "1", "2", "--n", "2"]
    gap.main([*few, *files])
    rows = json.loads((tmp_path / "gap.json").read_text())["rows"]
    assert len(rows) == 3 * 3
    for row in rows:
        assert all(row[name] <= row["optimum"] + 1e-6 for name in ("rrs", "k_seq", "greedy", "match") if name in row)
    assert (tmp_path / "gap.png").stat().st_size > 10_000
    assert "without_replacement" in capsys.readouterr().out


def test_a_pair_that_does_not_belong_together_is_one_line(gap, tmp_path):
    with pytest.raises(UserError, match="--model and --draft come together"):
        gap.main(["--model", str(tmp_path)])
