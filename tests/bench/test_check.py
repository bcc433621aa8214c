"""The check of all that computes on a device: it passes where all is right, and fails where something is not."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from draftdiff.bench import check
from draftdiff.cli import main


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs the command on a small case of its own; returns its status and its result."""
    monkeypatch.setattr(check, "CASES", (replace(check.CASES[7], about="a few tokens", tail=True),))

    def run():
        status = main(["bench", "check", "--device", "cpu", "-o", str(tmp_path)])
        return status, json.loads((tmp_path / "cpu-check.json").read_text())

    return run


def test_all_backends_and_drafts_are_right_here(bench):
    status, result = bench()
    assert status == 0 and result["wrong"] == 0
    checked = {row["what"] for row in result["rows"]}
    assert {"torch", "cpu", "triton", "flex", "triton, log-sum-exp", "pooling", "errors of tiles"} <= checked
    assert "single tokens" in checked


def test_what_is_wrong_is_told_and_ends_it_with_status_1(bench, monkeypatch, capsys):
    monkeypatch.setattr(check, "BACKENDS", ("torch",))
    right = check.drafting.singles
    monkeypatch.setattr(check.drafting, "singles", lambda *a, **k: (0 * right(*a, **k)[0], None))
    status, result = bench()
    assert status == 1 and result["wrong"] == 1
    assert "single tokens is wrong: a few tokens, float32, error 1" in capsys.readouterr().err


def test_a_nan_is_wrong_and_equal_infinities_are_not():
    inf, nan = torch.tensor([float("inf")]), torch.tensor([float("nan")])
    assert check.difference(inf, inf) == 0
    assert not check.difference(nan, inf) <= 1 and not check.difference(-inf, inf) <= 1


def test_tokens_that_are_missing_or_doubled_are_counted():
    expected = torch.tensor([[4, 7, 9, -1]])
    assert check.missed(torch.tensor([[9, 4, 7, -1]]), expected) == 0
    assert check.missed(torch.tensor([[9, 4, 5, -1]]), expected) == pytest.approx(1 / 3)
    assert check.missed(torch.tensor([[9, 9, 4, 7]]), expected) == 1


def test_shares_of_the_cases_are_all_of_them(tmp_path, capsys):
    def cases(*share):
        return check.Check(Namespace(device="cpu", output=tmp_path, threads=None, share=share)).cases()

    assert sorted(map(str, [case for share in (1, 2, 3) for case in cases(share, 3)])) == sorted(map(str, cases(1, 1)))
    for given, said in (("4", "3"), "at most the number of shares, 3, got 4"), (("99", "99"), "99 of 99 holds no case"):
        assert main(["bench", "check", "--device", "cpu", "-o", str(tmp_path), "--share", *given]) == 2
        assert f"--share {said}" in capsys.readouterr().err.replace("must be ", "")
