"""The command `draftdiff comfyui`: its nodes into a ComfyUI, and out of it."""

from __future__ import annotations

import json
from argparse import Namespace
from functools import partial
from pathlib import Path

from draftdiff.cli.options import Parser
from draftdiff.cli.output import note
from draftdiff.errors import user_errors


def add_comfyui(parser: Parser) -> None:
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    actions.add_parser("install", help="write a folder into custom_nodes that imports the nodes", fill=_install)
    actions.add_parser("uninstall", help="remove that folder", fill=_uninstall)


def _install(parser: Parser) -> None:
    _common(parser, "install")


def _uninstall(parser: Parser) -> None:
    _common(parser, "uninstall")


def _common(parser: Parser, action: str) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="the folder of ComfyUI, which holds custom_nodes")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(func=partial(_run, action=action))


def _run(options: Namespace, action: str) -> int:
    from draftdiff.integrations.comfyui import install

    with user_errors(NotADirectoryError, PermissionError):
        folder = getattr(install, action)(options.path)
    print(json.dumps({action: str(folder)}) if options.json else f"{action}ed {folder}")
    if action == "install":
        note("restart ComfyUI; the Python that runs it must have draftdiff installed")
    return 0
