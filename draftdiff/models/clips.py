"""Many clips of one run: what is to be made, under which names, what is there already, and who makes which.

Beside each clip stands a JSON file with all that it was made of; a clip whose file says so is made. Several processes,
on one machine or many with a common folder, share a run: each takes a lock on a clip before it makes it, which the
system frees if the process is killed, so that another one makes the clip.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftdiff.errors import UserError
from draftdiff.files import replacing

_CLAIMS = ".draftdiff-claims"
_WAIT = 0.5  # seconds between looks at clips that others are making


@dataclass(frozen=True)
class Clip:
    """One clip to make. made_of: everything else that it depends on, as JSON has it."""

    prompt: str
    seed: int
    output: Path
    made_of: dict[str, Any]

    @property
    def sidecar(self) -> Path:
        return self.output.with_name(re.sub(r"[-_.]*%0?\d*d", "", self.output.stem) + ".json")

    @property
    def settings(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "seed": self.seed, **self.made_of}

    def is_made(self) -> bool:
        """Whether the file beside it tells of these very settings."""
        try:
            told = json.loads(self.sidecar.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        there = self.output.exists() or "%" in self.output.name
        return there and isinstance(told, dict) and told.get("settings") == json.loads(json.dumps(self.settings))

    def write_sidecar(self, results: dict[str, Any]) -> None:
        told = {"settings": self.settings, **results}
        with replacing(self.sidecar) as partial:
            partial.write_text(json.dumps(told, indent=1, default=str) + "\n", encoding="utf-8")


def settings_in(path: Path) -> dict[str, Any]:
    """The settings that a clip's file tells. Raises UserError, in one line, for what is no such file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except OSError as error:
        raise UserError(f"--from {str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--from {str(path)!r} is not a file that draftdiff generate wrote beside a clip") from None


def prompts_in(path: Path) -> list[str]:
    """The lines of a file, without empty ones and those that begin with #. Raises UserError where there is none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {str(path)!r} cannot be read: {error}") from None
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise UserError(f"--prompt-file {str(path)!r} holds no prompt")
    return found


def plan(prompts: Sequence[str], seeds: Sequence[int], output: Path, ending: str | None, made_of: dict) -> list[Clip]:
    """The clips of every prompt and seed. ending: of files in the folder `output`, with its dot; None if `output` is
    the one file. Raises UserError for several clips and one file."""
    if ending is None:
        if len(prompts) * len(seeds) > 1:
            raise UserError(
                f"{len(prompts) * len(seeds)} clips need a folder: -o FOLDER --format NAME, got {str(output)!r}"
            )
        return [Clip(prompts[0], seeds[0], output, made_of)]
    digits = max(3, len(str(len(prompts))))
    names = [f"{number:0{digits}}-{_slug(prompt)}" for number, prompt in enumerate(prompts, start=1)]
    return [
        Clip(prompt, seed, output / f"{name}-{seed}{ending}", made_of)
        for name, prompt in zip(names, prompts)
        for seed in seeds
    ]


def _slug(prompt: str) -> str:
    """A few words of it that every file system takes."""
    return "-".join(re.findall(r"\w+", prompt.lower())[:6])[:48] or "clip"


def shared_out(clips: Sequence[Clip]) -> Iterator[tuple[Clip, bool]]:
    """The clips that this process is to make, each as (clip, False) while a lock is held on it, and those that were
    there at the start as (clip, True). Ends when all are made, by whomever: what a killed process leaves is taken over.
    """
    from filelock import FileLock, Timeout

    if len(clips) == 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield clips[0], False
        return
    claims = clips[0].output.parent / _CLAIMS
    open_clips = []
    for clip in clips:
        if clip.is_made():
            yield clip, True
        else:
            open_clips.append(clip)
    while open_clips:
        taken = len(open_clips)
        for clip in list(open_clips):
            if clip.is_made():
                open_clips.remove(clip)
                continue
            claims.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(claims / f"{clip.output.name}.lock", timeout=0):
                    if not clip.is_made():
                        yield clip, False
                    open_clips.remove(clip)
            except Timeout:  # another process makes it
                continue
        if taken == len(open_clips):
            time.sleep(_WAIT)
    shutil.rmtree(claims, ignore_errors=True)
