"""The fastest of a few kernel configurations, measured on the first real call and kept in the user's cache."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import torch

from draftdiff.kernels import cache

Config = TypeVar("Config")
Result = TypeVar("Result")
_ROUNDS = 3


class DoesNotCompile(Exception):
    """A configuration that this GPU or compiler cannot take."""


def fastest(
    key: str,
    configs: Sequence[Config],
    launch: Callable[[Config], Result],
    device: torch.device,
    right: Callable[[Result], bool],
) -> Config:
    """The config whose launch takes least time on `device`, a GPU, and gives what is `right`, the first time and the
    last: what a compiler makes of a kernel is not to be trusted on a GPU that nobody has tried. Those that raise
    DoesNotCompile are left out.

    The answer for `key` is kept, in this process and on disk. While a CUDA graph is captured nothing can be timed: the
    first config serves then, and nothing is kept. Raises RuntimeError if none is left.
    """
    known = _known(device)
    by_name = {str(config): config for config in configs}
    if known.get(key) in by_name:
        return by_name[known[key]]
    if torch.cuda.is_current_stream_capturing():
        return configs[0]
    log = logging.getLogger("draftdiff")
    log.info("choosing among %d kernel configurations for %s", len(configs), key)
    seconds: dict[str, float] = {}
    reasons: list[str] = []
    for name, config in by_name.items():
        try:
            with _no_compiler_noise():
                first = launch(config)
        except DoesNotCompile as error:
            reasons.append(f"{name}: {error}")
            continue
        is_right = right(first)
        time, last = _time(lambda config=config: launch(config), device)  # type: ignore[misc]
        if is_right and right(last):
            seconds[name] = time
        else:
            reasons.append(f"{name}: wrong results")
            log.warning("the kernel configuration %s gives wrong results on this GPU (%s): it is not used", name, key)
    if not seconds:
        raise RuntimeError(f"no kernel configuration compiles and is right for {key}: {'; '.join(reasons)}")
    known[key] = min(seconds, key=lambda name: seconds[name])
    _save(device, known)
    return by_name[known[key]]


def _time(call: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """The least time of a few calls, in milliseconds, and what the last has given."""
    best = float("inf")
    with torch.cuda.device(device):
        for _ in range(_ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = call()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end))
    return best, result


def _file(device: torch.device) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower())
    return f"triton-{name}.json"


@lru_cache(maxsize=16)
def _known(device: torch.device) -> dict[str, str]:
    return _read(_file(device))


def _read(name: str) -> dict[str, str]:
    """What is kept; nothing of a file that another program wrote or that was cut off: it is measured again."""
    path = cache.stored(name)
    try:
        kept = json.loads(path.read_bytes()) if path else {}
    except (OSError, ValueError, RecursionError):
        return {}
    whole = isinstance(kept, dict) and all(isinstance(value, str) for value in kept.values())
    return kept if whole else {}


def _save(device: torch.device, known: dict[str, str]) -> None:
    name = _file(device)
    kept = _read(name) | known  # another process may have measured others meanwhile
    cache.store(name, json.dumps(kept, indent=1).encode())


@contextmanager
def _no_compiler_noise() -> Iterator[None]:
    """A pass that fails prints its whole program to the process's standard error, past Python's."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
