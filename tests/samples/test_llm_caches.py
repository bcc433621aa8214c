"""The scripts about evicted caches and sparse prefill, on sizes small enough for a test."""

import json
from pathlib import Path

import pytest

SAMPLES = Path(__file__).resolve().parents[2] / "samples"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch):
    for folder in (SAMPLES, SAMPLES / "llm"):
        monkeypatch.syspath_prepend(str(folder))


def test_sparse_prefill_is_timed_and_checked(tmp_path, capsys):
    import bench_sparse_prefill

    given = [
        "--tokens",
        "100",
        "300",
        "--pattern",
        "64",
        "64",
        "--heads",
        "2",
        "--head-dim",
        "32",
        "--rounds",
        "1",
        "--device",
        "cpu",
        "--json",
    ]
    assert bench_sparse_prefill.main([*given, "-o", str(tmp_path)]) == 0
    payload = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "llm-sparse-prefill.json").read_text()) == payload
    attention, prefill = payload["rows"]  # 100 tokens fit into columns and band
    assert (attention["tokens"], prefill["tokens"]) == (300, 300) and attention["relative_l2"] < 1e-5
    # Rows of the first tile read what is before them, those of the others up to 64 columns as well.
    assert 1 < attention["limit"] < 300 / 64
    assert bench_sparse_prefill.main(["--pattern", "64", "100", "-o", str(tmp_path)]) == 2
    assert "multiple of 64, got 100" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--tokens", "--heads", "--key-heads", "--head-dim", "--rounds"])
def test_sparse_prefill_refuses_sizes_of_nothing(option, tmp_path):
    import bench_sparse_prefill

    with pytest.raises(SystemExit, match=f"argument {option}: must be a whole number from 1 on, got '0'"):
        bench_sparse_prefill.main([option, "0", "-o", str(tmp_path)])


def test_sparse_prefill_refuses_what_cannot_be_measured(tmp_path, capsys):
    import bench_sparse_prefill

    with pytest.raises(SystemExit, match="argument --device: device 'foo' cannot be used"):
        bench_sparse_prefill.main(["--device", "foo", "-o", str(tmp_path)])
    assert bench_sparse_prefill.main(["--tokens", "100", "-o", str(tmp_path)]) == 2
    assert "--tokens must have one above 1024, or all is read densely, got 100" in capsys.readouterr().err


def test_caches_are_scored_against_the_truth(tmp_path, capsys):
    import score_spec_kv

    given = ["--prompts", "2", "--tokens", "120", "--new-tokens", "4", "--capacity", "16", "119", "--json"]
    assert score_spec_kv.main([*given, "-o", str(tmp_path)]) == 0
    payload = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "llm-spec-kv.json").read_text()) == payload
    assert len(payload["rows"]) == 16
    for row in payload["rows"]:
        if row["capacity"] == 119 and row["kept_mass"] is not None:  # all of the prompt but its last token
            assert row["kept_mass"] == pytest.approx(1, abs=1e-4) and row["kept_recall"] == 1
            assert row["agreement"] == 1 and row["cache_share"] == 1
        elif row["kept_mass"] is not None:
            assert 0.1 < row["kept_mass"] < 1 and row["cache_share"] == pytest.approx(16 / 119, abs=1e-3)
    assert score_spec_kv.main(["--capacity", "9", "-o", str(tmp_path)]) == 2
    assert "--capacity must be at least twice the window of 8, got 9" in capsys.readouterr().err
