"""The day on a GPU, rehearsed: its plan, what it does with failures and limits, and its bars."""

import json
import subprocess

import pytest

from draftdiff.cli import gpu_day, main
from draftdiff.cli.bench import add_bench
from draftdiff.cli.options import Parser

SMALL = "--last-only --heads 1 --batch 1 --rounds 1 --density 1"


@pytest.fixture
def day(monkeypatch, tmp_path):
    """Runs the rehearsal of a plan; returns its status and its summary."""

    def run(*plan):
        monkeypatch.setattr(gpu_day, "PLAN", plan)
        status = main(["bench", "gpu-day", "--dry-run", "-o", str(tmp_path)])
        return status, json.loads((tmp_path / "gpu-day.json").read_text())

    return run


@pytest.mark.parametrize("job", gpu_day.PLAN, ids=lambda job: job.name)
def test_every_benchmark_of_the_plan_takes_its_options(job):
    for given in (job.options, job.rehearsal):
        if given is not None:
            parser = Parser(prog="bench")
            add_bench(parser)
            assert parser.parse_args([*job.name.split(), *given.split()]).func


@pytest.mark.parametrize("part", [1, 2])
def test_a_part_ends_within_ten_minutes(part):
    jobs = [job for job in gpu_day.PLAN if job.part == part]
    assert sum(job.minutes for job in jobs) < 9.5
    assert next(job.name for job in jobs if job.options is not None) == "check" or part == 2


def test_a_rehearsal_runs_each_benchmark_and_collects_what_it_wrote(day, tmp_path):
    status, summary = day(gpu_day.Job(1, "var attention", 1.0, "", SMALL), gpu_day.Job(2, "var models", 1.0, "", None))
    assert status == 0 and summary["dry_run"]
    (job,) = summary["jobs"]
    assert job["code"] == 0 and job["command"].startswith("draftdiff bench var attention --last-only")
    assert (tmp_path / "1-var-attention" / "cpu-var-attention.json").exists()
    assert "speed-up" in (tmp_path / "1-var-attention" / "log.txt").read_text()


def test_after_a_failed_check_nothing_is_timed(day, capsys):
    status, summary = day(gpu_day.Job(1, "check", 1.0, "", "--wrong"), gpu_day.Job(1, "var attention", 1.0, "", SMALL))
    assert status == 1
    assert [job["code"] for job in summary["jobs"]] == [2]
    assert "the check failed: nothing was timed" in capsys.readouterr().err


def test_what_reaches_its_limit_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day.subprocess, "run", _slow(gpu_day.subprocess.run))
    done = gpu_day._run(gpu_day.Job(1, "kernels", 0.001, "", None), tmp_path / "one", rehearse=False)
    assert done["code"] is None and done["seconds"] < 30


def test_shares_run_side_by_side_and_one_that_fails_fails_the_job(tmp_path, monkeypatch):
    started = []

    def run(command, **_):
        started.append(command[command.index("--share") + 1 :])
        return subprocess.CompletedProcess(command, int(started[-1][0] == "2"))

    monkeypatch.setattr(gpu_day.subprocess, "run", run)
    done = gpu_day._run(gpu_day.Job(1, "check", 1.0, "", "", shares=3), tmp_path, rehearse=False)
    assert done["code"] == 1 and sorted(started) == [["1", "3"], ["2", "3"], ["3", "3"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["share-1", "share-2", "share-3"]


def _slow(run):
    return lambda command, **more: run(["/bin/sleep", "60"], **more)


def test_whole_steps_are_held_to_amdahls_law(tmp_path):
    rows = [
        {"setting": "sparsity 0.8", "mode": "eager", "predicted_speedup": 2.0, "speedup": {"median": value}}
        for value in (1.96, 1.5)
    ]
    payload = {"run_steps": 50, "models": [{"name": "wan", "rows": [*rows, {"setting": "dense", "mode": "eager"}]}]}
    (tmp_path / "cpu-dit.json").write_text(json.dumps(payload))
    assert [(round(bar["measured"], 2), bar["met"]) for bar in gpu_day._bars(tmp_path)] == [(0.98, True), (0.75, False)]


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capsys):
    assert main(["bench", "gpu-day", "-o", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert "gpu-day needs a CUDA GPU, here is none" in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
