"""The check that kernels compile: what it says where they do, where one does not, and without Triton's compiler."""

import importlib.util
import json
import subprocess

import pytest

from draftdiff.bench import compile_ahead
from draftdiff.cli import main

FAILS = {"kernel": "forward", "error": "out of resource: shared memory"}


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs the command for two cards, whose processes answer as given; returns its status and its rows."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    def run(*answers):
        left = iter(answers)
        monkeypatch.setattr(compile_ahead.subprocess, "run", lambda *_, **__: next(left))
        status = main(["bench", "compile", "--capability", "80", "90", "-o", str(tmp_path)])
        return status, json.loads((tmp_path / "compile.json").read_text())["rows"]

    return run


def answer(code=0, out="", err=""):
    return subprocess.CompletedProcess([], code, out, err)


def test_kernels_that_compile_are_counted(bench):
    status, rows = bench(*[answer(out=json.dumps([{"kernel": "forward"}] * 3))] * 2)
    assert status == 0 and [(row["capability"], row["kernels"], row["wrong"]) for row in rows] == [
        (80, 3, []),
        (90, 3, []),
    ]


def test_a_kernel_that_does_not_compile_and_a_process_that_dies_end_it_with_status_1(bench, capsys):
    status, rows = bench(answer(out=json.dumps([FAILS])), answer(1, err="Traceback\nValueError: no such card"))
    assert status == 1 and [len(row["wrong"]) for row in rows] == [1, 1]
    said = capsys.readouterr().err
    assert "compute capability 80: out of resource: shared memory" in said
    assert "compute capability 90: ValueError: no such card" in said


def test_without_tritons_compiler_it_says_so_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert main(["bench", "compile", "-o", str(tmp_path)]) == 2
    assert "needs Triton with its compiler for NVIDIA GPUs" in capsys.readouterr().err
