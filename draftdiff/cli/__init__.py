"""The command `draftdiff`: generate a video, pictures or text, compare runs, convert models, or see what works here.

A mistake of the user is one line on standard error and exit code 2, what the machine cannot do (a full disk, too little
memory) one line and 1; Ctrl-C is 130, SIGTERM 143, a reader that has enough (`| head`) 141; a bug keeps its traceback,
with exit code 1.
"""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module

from draftdiff._version import __version__
from draftdiff.cli import memory
from draftdiff.cli.options import Parser
from draftdiff.errors import NotWritten, UserError

__all__ = ["main", "run"]

# Name, help, and where its options are added: torch and diffusers take seconds to import, so only once it is chosen.
_COMMANDS = (
    ("generate", "make videos or images", "generate", "add_generate"),
    ("compare", "time and judge dense and sparse runs side by side", "video", "add_compare"),
    ("tune", "find where a model needs its attention, and write a profile", "video", "add_tune"),
    ("ui", "a local page: dense and sparse under one slider", "ui", "add_ui"),
    ("image", "pictures by VAR or Infinity, with CoDe and ScaleKV; --compare, calibrate", "image", "add_image"),
    ("convert", "original checkpoints of VAR, CoDe or Infinity to a folder", "convert", "add_convert"),
    ("llm", "text by language models with a draft; generate, compare", "llm", "add_llm"),
    ("comfyui", "install or uninstall the nodes for ComfyUI", "comfyui", "add_comfyui"),
    ("bench", "benchmarks with their checks: kernels, dit, var, llm", "bench", "add_bench"),
    ("doctor", "what works here: devices, backends, tools, models", "doctor", "add_doctor"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        code = run(partial(_run, list(sys.argv[1:] if argv is None else argv)), "draftdiff")
    except BrokenPipeError:
        code = _CLOSED_PIPE
    try:
        sys.stdout.flush()
    except OSError as error:
        # Python writes at its end what is still buffered: it must not meet the closed pipe or full disk again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return _CLOSED_PIPE
        print(f"draftdiff: error: standard output cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    return code


def _run(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    options.command_line = shlex.join(["draftdiff", *argv])
    return options.func(options)


def run(call: Callable[[], int | None], name: str) -> int:
    """The exit code of a command or a script of that name; what is no bug of ours is one line."""
    try:
        with _signals_as_exits():
            return call() or 0
    except (KeyboardInterrupt, SystemExit) as end:
        return _ended(end, name)
    except Exception as error:
        behind = _end_behind(error)
        if behind is not None:
            return _ended(behind, name)
        told = _told(error)
        if told is None:
            raise
        code, message = told
        print(f"{name}: error: {' '.join(message.split()).removeprefix('draftdiff: ')}", file=sys.stderr)
        return code


def _end_behind(error: BaseException | None) -> KeyboardInterrupt | SystemExit | None:
    """What ended the program where a library made an error of its own of it, as transformers does while importing."""
    while error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit)):
        error = error.__cause__ or error.__context__
    return error


def _ended(end: KeyboardInterrupt | SystemExit, name: str) -> int:
    if isinstance(end, KeyboardInterrupt):
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    if isinstance(end.code, str):
        print(f"{name}: {end.code}", file=sys.stderr)
        return 1
    code = int(end.code or 0)  # 0 of --help and --version
    if code > _SIGNALLED:
        print(f"{name}: ended by {signal.Signals(code - _SIGNALLED).name}", file=sys.stderr)
    return code


def _told(error: Exception) -> tuple[int, str] | None:
    """Exit code and message of what is no bug of ours, else None."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, NotWritten):
        return 1, f"{error.filename!r} cannot be written: {error.strerror}"
    if isinstance(error, OSError) and error.errno in _FULL:
        return 1, f"{error.strerror}{f': {error.filename!r}' if error.filename else ''}"
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] != "draftdiff":
        what = f"the package {error.name!r} is not installed" if error.name else str(error)
        return 1, f"{what}; draftdiff doctor tells all that is missing"
    short = memory.told(error)
    return None if short is None else (1, short)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_SIGNALLED = 128  # added to the number of the signal that ended a program, as shells do
_CLOSED_PIPE = 141


@contextmanager
def _signals_as_exits() -> Iterator[None]:
    """What schedulers and closed terminals send ends the program as Ctrl-C does: what it was writing is removed."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(_SIGNALLED + number)

    here = threading.current_thread() is threading.main_thread()
    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ours = [number for number in known if here and signal.getsignal(number) is signal.SIG_DFL]  # not under nohup
    for number in ours:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _parser() -> Parser:
    parser = Parser(
        prog="draftdiff",
        description="Cheap drafts for expensive models: sparse attention, CoDe, ScaleKV, and language-model drafts.",
    )
    parser.add_argument("--version", action="version", version=f"draftdiff {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, text, module, function in _COMMANDS:
        commands.add_parser(name, help=text, fill=partial(_fill, module, function))
    return parser


def _fill(module: str, function: str, parser: Parser) -> None:
    getattr(import_module(f"draftdiff.cli.{module}"), function)(parser)
