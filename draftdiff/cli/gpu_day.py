"""The command `draftdiff bench gpu-day`: all benchmarks that a new GPU deserves, two parts of under ten minutes each.

What is right comes before what is fast: after a failed check nothing is timed. Every benchmark is a process of its own
with a limit, and has written what it had when it is stopped. Nothing is installed; what is missing is left out.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from draftdiff.cli.options import Parser, whole
from draftdiff.cli.output import note
from draftdiff.errors import UserError


@dataclass(frozen=True)
class Job:
    """One benchmark. minutes: its limit on a GPU.  options: on a GPU, rehearsal: on a CPU; None leaves it out there.
    shares: so many processes do it side by side, which saves compiling in turn; not for what is timed.
    """

    part: int
    name: str
    minutes: float
    options: str | None
    rehearsal: str | None
    shares: int = 1


DENSITIES = "0.1 0.15 0.2 0.25 0.5 1"
PLAN = (
    Job(1, "compile", 0, None, ""),
    Job(1, "check", 3.5, "", "", shares=8),
    Job(1, "kernels", 3.5, f"--cases wan-14b even --densities {DENSITIES} --rounds 5", "--cases cpu-64 --rounds 1"),
    Job(1, "kernels", 2.0, "--cases wan-1.3b hunyuan wan-14b-64 --densities 0.15 0.25 1 --rounds 3", None),
    Job(
        2,
        "dit",
        6.0,
        "--layers 6 --sparsity 0.8 --rounds 3",
        "--models wan-1.3b --layers 2",
    ),
    Job(2, "var models", 1.5, "--batch 1 --rounds 2", None),
    Job(2, "var attention", 0.7, "--last-only --rounds 3", "--last-only --heads 1 --batch 1 --rounds 1 --density 1"),
    Job(2, "llm prefill", 0.8, "--rounds 3", "--tokens 4096 --heads 1 --rounds 1"),
)


def add_gpu_day(parser: Parser) -> None:
    parser.add_argument("--part", type=whole(1, 2), nargs="+", default=[1, 2], help="1, 2 or both (default: both)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="rehearse on the CPU, the Triton kernels compiled for every card and run in their interpreter: before a "
        "card's first minute",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu-day"), metavar="FOLDER", help="default: gpu-day")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON instead of the table")
    parser.set_defaults(func=_gpu_day)


def _gpu_day(options: Namespace) -> int:
    from draftdiff.bench.runner import write_json
    from draftdiff.files import prepare_folder
    from draftdiff.models.devices import device_name, find_device, versions

    device = find_device("cpu" if options.dry_run else None)
    if device.type != "cuda" and not options.dry_run:
        raise UserError("gpu-day needs a CUDA GPU, here is none; --dry-run rehearses it on the CPU")
    prepare_folder(options.output)
    jobs = [
        job
        for job in PLAN
        if job.part in options.part and (job.rehearsal if options.dry_run else job.options) is not None
    ]
    summary: dict[str, Any] = {
        "made_by": "draftdiff bench gpu-day",
        "device": device_name(device),
        "versions": versions(),
        "dry_run": options.dry_run,
        "jobs": [],
        "bars": [],
    }
    for number, job in enumerate(tqdm(jobs, desc="gpu-day", unit="benchmark")):
        folder = options.output / f"{number + 1}-{job.name.replace(' ', '-')}"
        done = _run(job, folder, options.dry_run)
        summary["jobs"].append(done)
        summary["bars"] += list(_bars(folder))
        write_json(options.output / "gpu-day.json", summary)
        if job.name == "check" and done["code"] != 0:
            note("the check failed: nothing was timed")
            break
    print(json.dumps(summary, indent=1) if options.json else "\n".join(_table(summary)))
    return int(any(job["code"] not in (0, None) for job in summary["jobs"]))


def _run(job: Job, folder: Path, rehearse: bool) -> dict[str, Any]:
    """A benchmark in its own process. code: its exit code, None where it was stopped at its limit."""
    given = job.rehearsal if rehearse else job.options
    words = [
        *job.name.split(),
        *shlex.split(given or ""),
        *(["--device", "cpu"] if rehearse else []),
    ]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if rehearse else {})
    command = [sys.executable, "-m", "draftdiff", "bench", *words]
    started = time.perf_counter()
    limit = None if rehearse else 60 * job.minutes

    def one(more: list[str], to: Path) -> int | None:
        to.mkdir(parents=True, exist_ok=True)
        whole = [*command, "-o", str(to), *more]
        with (to / "log.txt").open("w", encoding="utf-8") as log:
            try:
                done = subprocess.run(whole, stdout=log, stderr=log, env=environment, check=False, timeout=limit)
            except subprocess.TimeoutExpired:
                return None
        return done.returncode

    shares = 1 if rehearse else job.shares
    if shares == 1:
        codes = [one([], folder)]
    else:
        each = [["--share", str(share), str(shares)] for share in range(1, shares + 1)]
        with ThreadPoolExecutor(shares) as pool:
            codes = list(pool.map(one, each, [folder / f"share-{more[1]}" for more in each]))
    code = None if None in codes else max(code for code in codes if code is not None)
    return {
        "command": shlex.join(["draftdiff", "bench", *words, "-o", str(folder)]),
        "code": code,
        "seconds": time.perf_counter() - started,
    }


def _bars(folder: Path) -> Iterator[dict[str, Any]]:
    """The bars of a benchmark's results: the kernels' own, and for whole steps how near they come to Amdahl's law."""
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        yield from result.get("bars", [])
        for model in result.get("models", []) if "run_steps" in result else []:
            for row in model["rows"]:
                if row.get("predicted_speedup") and row.get("speedup") and row["setting"].startswith("sparsity"):
                    reached = row["speedup"]["median"] / row["predicted_speedup"]
                    what = f"{model['name']}, {row['mode']}, {row['setting']}: speed-up over Amdahl's"
                    yield {"what": what, "measured": reached, "bar": ">= 0.95", "met": reached >= 0.95}


def _table(summary: dict[str, Any]) -> Iterator[str]:
    yield summary["device"]
    for job in summary["jobs"]:
        ended = {0: "done", None: "stopped at its limit"}.get(job["code"], f"failed ({job['code']})")
        yield f"{ended:<22} {job['seconds']:6.0f} s  {job['command']}"
    for bar in summary["bars"]:
        yield f"{'met    ' if bar['met'] else 'NOT MET'} {bar['what']}: {bar['measured']:.3f} (bar {bar['bar']})"
