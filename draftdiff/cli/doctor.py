"""The command `draftdiff doctor`."""

from __future__ import annotations

import json
from argparse import Namespace

from draftdiff.cli.options import Parser


def add_doctor(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(func=_doctor)


def _doctor(options: Namespace) -> int:
    from draftdiff.doctor import examine, is_healthy, to_text

    findings = examine()
    print(json.dumps(findings, indent=1) if options.json else to_text(findings))
    return 0 if is_healthy(findings) else 1
