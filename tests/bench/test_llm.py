"""The benchmarks of language models, on sizes small enough for a test."""

import json

import pytest
import torch

from draftdiff.bench import sparse_prefill, speculation
from draftdiff.cli import main


@pytest.fixture
def bench(tmp_path):
    return lambda part, *arguments: main(["bench", "llm", part, "-o", str(tmp_path), *arguments])


TINY = ["--tokens", "100", "300", "--pattern", "64", "64", "--heads", "2", "--head-dim", "32", "--rounds", "1"]


def test_sparse_prefill_is_timed_and_checked(bench, tmp_path, capsys):
    assert bench("prefill", *TINY, "--device", "cpu", "--json") == 0
    payload = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "llm-sparse-prefill.json").read_text()) == payload
    attention, prefill = payload["rows"]  # 100 tokens fit into columns and band
    assert (attention["tokens"], prefill["tokens"]) == (300, 300) and attention["relative_l2"] < 1e-5
    # Rows of the first tile read what is before them, those of the others up to 64 columns as well.
    assert 1 < attention["limit"] < 300 / 64


def test_sparse_prefill_that_is_wrong_fails_the_benchmark(bench, monkeypatch, capsys):
    right = sparse_prefill.vertical_slash_attention
    monkeypatch.setattr(sparse_prefill, "vertical_slash_attention", lambda *a, **k: 1.01 * right(*a, **k))
    assert bench("prefill", *TINY, "--device", "cpu") == 1
    assert "failed: 300 tokens differ from attention under the mask" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--tokens", "--heads", "--key-heads", "--head-dim", "--rounds"])
def test_sparse_prefill_refuses_sizes_of_nothing(option, bench, capsys):
    assert bench("prefill", option, "0") == 2
    assert f"argument {option}: must be a whole number from 1 on, got '0'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--device", "foo"], "device 'foo' cannot be used"),
        (["--pattern", "64", "100"], "multiple of 64, got 100"),
        (["--heads", "4", "--key-heads", "3"], "--heads must be a multiple of --key-heads 3, got 4"),
        (["--tokens", "100"], "--tokens must have one above 1024, or all is read densely, got 100"),
    ],
)
def test_sparse_prefill_refuses_what_cannot_be_measured(given, said, bench, tmp_path, capsys):
    assert bench("prefill", *given) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_loop_is_measured_beside_its_bars(bench, tmp_path, capsys):
    assert bench("loop", "--rounds", "1") == 0
    rows = json.loads((tmp_path / "llm-loop.json").read_text())["rows"]
    assert {row["bar"] for row in rows} == {1.0, 2.0, 50.0}
    assert all(row["ms"]["median"] > 0 for row in rows)
    assert "n-gram proposal" in capsys.readouterr().out


def test_a_deeper_target_writes_the_same_text_at_a_smaller_relative_cost_of_the_draft(bench, tmp_path):
    given = ["--times", "1", "2", "--prompts", "1", "--prompt-tokens", "32", "--tokens", "12", "--rounds", "1"]
    assert bench("speculation", *given) == 0
    rows = json.loads((tmp_path / "llm-speculation.json").read_text())["rows"]
    shallow, deep = ([row for row in rows if row["layers"] == layers] for layers in (6, 12))
    assert len(shallow) == len(deep) == len(speculation.METHODS)
    assert all(b["cost"] < a["cost"] and b["speedup"]["median"] > 0 for a, b in zip(shallow, deep))
    assert [row["tokens_per_forward"] for row in shallow] == [row["tokens_per_forward"] for row in deep]
    assert (tmp_path / "llm-speculation.png").stat().st_size > 10_000


def test_a_target_that_writes_something_else_fails_the_benchmark(bench, monkeypatch, capsys):
    stock = speculation.compare_methods

    def other(*arguments, **options):
        comparison = stock(*arguments, **options)
        comparison.results[1].runs[0].tokens = torch.zeros(3, dtype=torch.int64)
        return comparison

    monkeypatch.setattr(speculation, "compare_methods", other)
    monkeypatch.setattr(speculation, "METHODS", ("chain",))
    given = ["--times", "1", "--prompts", "1", "--prompt-tokens", "32", "--tokens", "12", "--rounds", "1"]
    assert bench("speculation", *given) == 1
    assert "at 6 layers wrote something else than plain decoding" in capsys.readouterr().err
