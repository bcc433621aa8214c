"""The one runner of `draftdiff bench`: calls in turn within rounds, results on the disk after each case, checks.

A speed-up is a ratio within a round, in one process: a machine that slows down slows both of its sides. Every timing is
also a check, and a failed one ends the benchmark with exit code 1.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import re
import sys
import time
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from tqdm import tqdm

from draftdiff.errors import UserError
from draftdiff.files import prepare_folder, replacing
from draftdiff.models.devices import device_name, find_device, versions

NO_MEMORY = "not enough memory on this device"
NO_MATPLOTLIB = "no plot without matplotlib: pip install 'draftdiff[plots]'"
Key = TypeVar("Key")
Sample = TypeVar("Sample")
T = TypeVar("T")


class Absent(Exception):
    """Why something has no figure here."""


class Routine(ABC):
    """What a benchmark measures.

    name: the command's words.  file: name of its results, in which {device} stands for the device's.  key: where they
    are in the JSON.  picture: the function of `bench.plot` that draws them.  failures: checks that failed.
    """

    name: ClassVar[str]
    file: ClassVar[str]
    key: ClassVar[str] = "rows"
    picture: ClassVar[str | None] = None

    def __init__(self, options: Namespace) -> None:
        """Raises UserError, in one line, for options that make no sense together or here."""
        self.options = options
        self.device = find_device(options.device)
        if self.device.type not in ("cpu", "cuda"):
            raise UserError(f"--device must be cpu, cuda or cuda:N, got {options.device!r}")
        prepare_folder(options.output)
        if options.threads:
            torch.set_num_threads(options.threads)
        self.failures: list[str] = []

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @abstractmethod
    def cases(self) -> Sequence[Any]:
        """What is measured one after the other."""

    @abstractmethod
    def measure(self, case: Any) -> list[dict[str, Any]]:
        """The results of a case; notes its failures."""

    def about(self) -> dict[str, Any]:
        """What the results say beside device, versions and command."""
        return {}

    def conclude(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        """What follows from all results so far."""
        return {}

    @abstractmethod
    def table(self, payload: Mapping[str, Any]) -> Iterable[str]:
        """The results for a terminal."""


def run(routine: Routine) -> int:
    """Measure all cases, write, print and draw them. Returns the exit code: 1 if a check failed, 130 after Ctrl-C."""
    options, device = routine.options, routine.device
    path = options.output / f"{routine.file.format(device=device_slug(device))}.json"
    threads = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} " if "OMP_NUM_THREADS" in os.environ else ""
    results: list[dict[str, Any]] = []
    loads: list[list[float]] = []
    payload: dict[str, Any] = {
        "made_by": f"draftdiff bench {routine.name}",
        "device": device_name(device),
        "versions": versions(),
        "command": threads + options.command_line,
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        **routine.about(),
        "complete": False,
        "load_average": loads,
        routine.key: results,
    }
    cases = routine.cases()
    try:
        with torch.cuda.device(device) if routine.on_gpu else nullcontext():
            for number, case in enumerate(tqdm(cases, desc=routine.name, unit="case"), start=1):
                results += routine.measure(case)
                loads.append([round(load, 2) for load in os.getloadavg()])  # other work on the machine shows here
                release(device)
                payload |= routine.conclude(results) | {"complete": number == len(cases)}
                write_json(path, payload)  # after each: the next one may take an hour
    except KeyboardInterrupt:
        print(f"draftdiff: interrupted; {len(loads)} of {len(cases)} cases are in {path}", file=sys.stderr)
        return 130
    print(
        json.dumps(payload, indent=1) if options.json else "\n".join(line.rstrip() for line in routine.table(payload))
    )
    if routine.picture is not None and importlib.util.find_spec("matplotlib") is None:
        print(f"draftdiff: note: {NO_MATPLOTLIB}", file=sys.stderr)
    elif routine.picture is not None:
        draw(routine.picture, payload, path)
    for failure in routine.failures:
        print(f"draftdiff: failed: {failure}", file=sys.stderr)
    return 1 if routine.failures else 0


def redraw(picture: str, file: Path) -> int:
    """Draw the picture of an earlier result anew, beside its file. Raises UserError for what is no such file."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(NO_MATPLOTLIB)
    try:
        payload = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--redraw {str(file)!r} cannot be read: {error}") from None
    draw(picture, payload, file)
    return 0


def draw(picture: str, payload: Mapping[str, Any], file: Path) -> None:
    """The picture of a result beside its file. Needs matplotlib."""
    from draftdiff.bench import plot

    getattr(plot, picture)(payload, file.with_suffix(".png"))


def in_turns(
    makers: Mapping[Key, Callable[[], Callable[[], Sample]]],
    rounds: int,
    why: Callable[[Exception], str | None] | None = None,
) -> tuple[dict[Key, list[Sample]], dict[Key, str]]:
    """Samples of each call in each round, all calls in turn within a round, and why some have none.

    makers: prepare a call, and warm it up.  why: the reason why an exception leaves a call out, None to raise it; by
    default too little memory and `Absent` are reasons.
    """
    calls: dict[Key, Callable[[], Sample]] = {}
    samples: dict[Key, list[Sample]] = {}
    absent: dict[Key, str] = {}
    with tqdm(total=(1 + rounds) * len(makers), unit="call", leave=False) as bar:
        for number, key in product(range(1 + rounds), makers):
            bar.set_postfix_str(f"{key}, {f'round {number}' if number else 'warm-up'}")
            bar.update()
            if key in absent:
                continue
            try:
                if number == 0:
                    calls[key] = makers[key]()
                    samples[key] = []
                else:
                    samples[key].append(calls[key]())
            except Exception as error:
                reason = (why or reason_of)(error)
                if reason is None:
                    raise
                absent[key] = reason
            if key in absent:  # outside the except clause, which holds the frames and what lives in them
                calls.pop(key, None)
                samples.pop(key, None)
                gc.collect()
    return samples, absent


def reason_of(error: Exception) -> str | None:
    """Why something could not run, if that is no bug."""
    if isinstance(error, Absent):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        return f"{NO_MEMORY}: {' '.join(str(error).split())[:300]}"
    return None


def ratios(base: Sequence[float], own: Sequence[float]) -> list[float]:
    """How many times as fast as the base, round by round."""
    return [b / o for b, o in zip(base, own)]


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What a call returns, and the seconds until its work on the device was done. Python collects no garbage meanwhile:
    with the hosts' many objects that may take a tenth of a second."""
    with _no_collection():
        if device.type != "cuda":
            started = time.perf_counter()
            result = call()
            return result, time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        result = call()
        end.record()
        end.synchronize()
        return result, start.elapsed_time(end) / 1000


@contextmanager
def _no_collection() -> Iterator[None]:
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def warmed(call: Callable[[], Any], device: torch.device) -> Callable[[], Callable[[], float]]:
    """The maker of a call's seconds."""

    def make() -> Callable[[], float]:
        call()
        return lambda: timed(call, device)[1]

    return make


def device_slug(device: torch.device) -> str:
    """The device's name as the start of a file name: "cpu", "nvidia-h100-80gb-hbm3"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_json(path: Path, payload: Mapping[str, Any]) -> None:
    """Write a result, whole or not at all. Raises ValueError for NaN or inf in it."""
    text = json.dumps(payload, indent=1, allow_nan=False)
    with replacing(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def release(device: torch.device) -> None:
    """Give back the memory of what is not used any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_names(option: str, given: Sequence[str], known: Iterable[str]) -> None:
    """Raise UserError for a name that is not known."""
    for name in given:
        if name not in (names := list(known)):
            raise UserError(f"{option} must be among {', '.join(names)}, got {name!r}")
