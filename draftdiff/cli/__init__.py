"""The command `draftdiff`: generate a video, pictures or text, compare runs, convert models, or see what works here.

A mistake of the user is one line on standard error and exit code 2; Ctrl-C is 130, a reader that has enough (`| head`)
141; a bug keeps its traceback, with exit code 1.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module

from draftdiff._version import __version__
from draftdiff.cli.options import Parser
from draftdiff.errors import UserError

__all__ = ["main", "run"]

# Name, help, and where its options are added: torch and diffusers take seconds to import, so only once it is chosen.
_COMMANDS = (
    ("generate", "make one video or image", "video", "add_generate"),
    ("compare", "time and judge dense and sparse runs side by side", "video", "add_compare"),
    ("image", "pictures by VAR or Infinity, with CoDe and ScaleKV; --compare, calibrate", "image", "add_image"),
    ("convert", "original checkpoints of VAR, CoDe or Infinity to a folder", "convert", "add_convert"),
    ("llm", "text by language models with a draft; generate, compare", "llm", "add_llm"),
    ("bench", "benchmarks with their checks: kernels, dit, var, llm", "bench", "add_bench"),
    ("doctor", "what works here: devices, backends, tools, models", "doctor", "add_doctor"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        code = run(partial(_run, list(sys.argv[1:] if argv is None else argv)), "draftdiff")
        sys.stdout.flush()  # here, where a closed pipe is understood
        return code
    except BrokenPipeError:
        # Python writes at its end what is still buffered: it must not meet the closed pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as of a program that the signal ended


def _run(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    options.command_line = shlex.join(["draftdiff", *argv])
    return options.func(options)


def run(call: Callable[[], int | None], name: str) -> int:
    """The exit code of a command or a script of that name; a mistake of the user and Ctrl-C are one line."""
    try:
        return call() or 0
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    except Exception as error:
        too_small = type(error).__name__ == "OutOfMemoryError"  # torch's, which may not be imported
        if not isinstance(error, UserError) and not too_small:
            raise
        message = " ".join(str(error).split()).removeprefix("draftdiff: ")
        print(f"{name}: error: {message}", file=sys.stderr)
        return 2


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
