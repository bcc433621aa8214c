"""The command `draftdiff convert`: from original checkpoints to folders that the others read."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from draftdiff.cli.options import Parser
from draftdiff.cli.output import note
from draftdiff.errors import user_errors


def add_convert(convert: Parser) -> None:
    convert.add_argument(
        "sources", nargs="+", metavar="SRC", help="a transformer and its autoencoder (two transformers: a CoDe pair)"
    )
    convert.add_argument("destination", type=Path, metavar="DST", help="a new folder")
    convert.add_argument("--draft-scales", type=int, metavar="N", help="of a pair (default: from its file names, or 8)")
    convert.add_argument("--text-encoder", metavar="MODEL", help="folder or Hub id of Infinity's flan-t5-xl")
    convert.add_argument("--dtype", help="float32, float16 or bfloat16 (default: as in the files)")
    convert.add_argument("--json", action="store_true")
    convert.set_defaults(func=_convert)


def _convert(options: Namespace) -> int:
    from draftdiff.models.devices import dtype_named
    from draftdiff.pipelines.convert import convert

    dtype = None if options.dtype is None else dtype_named(options.dtype)
    with user_errors(FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError):
        kind = convert(
            options.sources,
            options.destination,
            draft_scales=options.draft_scales,
            text_encoder=options.text_encoder,
            torch_dtype=dtype,
        )
    if options.json:
        print(json.dumps({"output": str(options.destination), "class": kind}))
    else:
        print(f"{options.destination}: {kind}")
    if kind == "InfinityPipeline" and options.text_encoder is None:
        note("without --text-encoder it takes embeddings only, no prompts")
    return 0
