"""The command `draftdiff doctor`."""

from __future__ import annotations

import json
from argparse import Namespace

from draftdiff.cli.options import Parser, add_place


def add_doctor(parser: Parser) -> None:
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="see whether draft attention fits this saved pipeline or transformer: all kept equals dense, sparse is "
        "sparse, and disabled it is what it was",
    )
    parser.add_argument(
        "--layout", metavar="MODULE:NAME", help="draftdiff.Layout of a transformer that the table does not have"
    )
    add_place(parser)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(func=_doctor)


def _doctor(options: Namespace) -> int:
    if options.model is not None:
        return _model(options)
    for name in ("layout", "device", "dtype"):
        if getattr(options, name) is not None:
            from draftdiff.errors import UserError

            raise UserError(f"--{name} is for --model")
    from draftdiff.doctor import examine, is_healthy, to_text

    findings = examine()
    print(json.dumps(findings, indent=1) if options.json else to_text(findings))
    return 0 if is_healthy(findings) else 1


def _model(options: Namespace) -> int:
    from draftdiff.models.layout_check import check_model

    found = check_model(options.model, options.layout, device=options.device, dtype=options.dtype)
    if options.json:
        print(json.dumps([finding.to_dict() for finding in found], indent=1))
    else:
        print("\n".join(map(str, found)))
    return 0 if all(finding.holds for finding in found) else 1
