"""The scores of evicted caches, on sizes small enough for a test."""

import json
from pathlib import Path

import pytest

from draftdiff.errors import UserError

SAMPLES = Path(__file__).resolve().parents[2] / "samples" / "llm"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(SAMPLES))


def test_caches_are_scored_against_the_truth(tmp_path, capsys):
    import score_spec_kv

    given = ["--prompts", "2", "--tokens", "120", "--new-tokens", "4", "--capacity", "16", "119", "--json"]
    score_spec_kv.main([*given, "-o", str(tmp_path)])
    payload = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "llm-spec-kv.json").read_text()) == payload
    assert len(payload["rows"]) == 16
    for row in payload["rows"]:
        if row["capacity"] == 119 and row["kept_mass"] is not None:  # all of the prompt but its last token
            assert row["kept_mass"] == pytest.approx(1, abs=1e-4) and row["kept_recall"] == 1
            assert row["agreement"] == 1 and row["cache_share"] == 1
        elif row["kept_mass"] is not None:
            assert 0.1 < row["kept_mass"] < 1 and row["cache_share"] == pytest.approx(16 / 119, abs=1e-3)
    with pytest.raises(UserError, match="--capacity must be at least twice the window of 8, got 9"):
        score_spec_kv.main(["--capacity", "9", "-o", str(tmp_path)])
