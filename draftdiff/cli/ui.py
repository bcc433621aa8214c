"""The command `draftdiff ui`: a local page to try dense and sparse attention."""

from __future__ import annotations

import json
import socket
from argparse import Namespace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from draftdiff.cli import memory
from draftdiff.cli.options import Parser, whole
from draftdiff.cli.output import note
from draftdiff.cli.video import add_attention, add_model, config_of, load_model
from draftdiff.errors import UserError
from draftdiff.ui.sessions import Sessions

if TYPE_CHECKING:
    from draftdiff.ui.session import Session

_EMBEDDED = "the embedded model"


def add_ui(parser: Parser) -> None:
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on; default: this machine")
    parser.add_argument("--port", type=whole(0, 65535), default=7860, metavar="N", help="0 takes a free one")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="offer settings that draftdiff tune wrote")
    add_attention(parser)
    add_model(parser, with_seed=False, several=True)
    parser.add_argument("--json", action="store_true", help="print the address as JSON once it listens")
    parser.set_defaults(func=_ui)


def _ui(options: Namespace) -> int:
    if find_spec("gradio") is None:
        raise UserError("draftdiff ui needs gradio: pip install 'draftdiff[ui]'")
    port = _free(options.host, options.port)
    models = {name: name for name in options.model or []} | {_EMBEDDED: None}
    sessions = Sessions({name: partial(_load, options, model) for name, model in models.items()})
    sessions.of(sessions.names[0])  # what is wrong with the first is told before anything is served
    from draftdiff.ui import page

    address = f"http://{f'[{options.host}]' if ':' in options.host else options.host}:{port}"
    if not page.is_local(options.host):
        note(f"everybody who reaches {options.host} can run the models; 127.0.0.1 is for this machine alone")

    def ready() -> None:
        print(json.dumps({"url": address}) if options.json else f"{address} (Ctrl-C ends it)", flush=True)

    application = page.app(sessions, memory.told, options.host)
    page.Server(application, options.host, port, ready, sessions.cancel_all).run()
    return 0


def _load(options: Namespace, name: str | None) -> Session:
    """A session of one of the models. Raises UserError where the options do not suit it."""
    own = Namespace(**{**vars(options), "model": name})
    base = config_of({}, own)
    profile = config_of({"profile": options.profile}, own) if options.profile else None
    model, call = load_model(own, [base, *([profile] if profile else [])])
    from draftdiff.ui.session import Session

    return Session(model, base, profile, call)


def _free(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises UserError where it cannot be listened on, before a model is loaded."""
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise UserError(f"cannot listen on --host {host!r} --port {port}: {error.strerror}") from None
