"""The page in gradio, and the server it runs on: on this machine alone, with nothing fetched from or told to others."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from draftdiff.errors import UserError, one_line
from draftdiff.models.video import EMBEDDED, world_prompts
from draftdiff.ui import view
from draftdiff.ui.session import Asked, Cancelled, Progress, Session
from draftdiff.ui.sessions import Sessions

# Of the browser: gradio's page names fonts and scripts of other sites, which it does without.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'none'; frame-ancestors 'none'"
)
# Gradio's ways to files and other sites, none of which the page uses.
_CLOSED = ("/file", "/upload", "/proxy", "/stream", "/download", "/monitoring")
_SPARSITY, _PROFILE = "sparsity", "profile"
_EXAMPLES = "examples"


def build(sessions: Sessions, told: Callable[[Exception], str | None]) -> gr.Blocks:
    """The page of these models, the first of which is shown. told: the one line about an error of the machine, too
    little memory say, else None."""

    def failed(error: Exception, title: str) -> gr.Error:
        line = str(error) if isinstance(error, UserError) else told(error)
        if line is None:
            traceback.print_exception(error)
            line = f"{one_line(error)} (the terminal tells more)"
        return gr.Error(_plain(line), title=title, duration=15, print_exception=False)

    def run(
        model: str,
        prompt: str,
        kind: str,
        sparsity: float,
        seed: float | None,
        steps: float | None,
        frames: float | None,
        width: float | None,
        height: float | None,
        request: gr.Request,
        progress: Any = gr.Progress(),  # noqa: B008 - how gradio knows it
    ) -> tuple[str, str, str]:
        numbers = {"seed": seed or 0, "steps": steps, "frames": frames, "width": width, "height": height}
        whole = {name: None if value is None else int(value) for name, value in numbers.items()}
        asked = Asked(prompt, sparsity=None if kind == _PROFILE else sparsity, **whole)  # type: ignore[arg-type]

        def tell(now: Progress) -> None:
            progress(now.step / now.steps if now.steps else None, desc=str(now))

        progress(None, desc="waiting for the model")
        try:
            session = sessions.of(model)  # another visitor may have asked for another one
            shown = session.run(asked, tell, request.session_hash or "")
        except Cancelled:
            raise gr.Error("cancelled between two steps", title="Stopped", duration=4, print_exception=False) from None
        except Exception as error:
            raise failed(error, "Not made") from None
        return view.clips(shown, session.model.fps), view.figures(shown), view.where(shown)

    def choose(model: str) -> list[Any]:
        try:
            fields = _fields(sessions.of(model))
        except Exception as error:
            raise failed(error, "Not loaded") from None
        return [gr.update(**field) for field in fields.values()]

    def stop(request: gr.Request) -> None:
        sessions.cancel(request.session_hash or "")

    first = sessions.of(sessions.names[0])
    own, prompts, profiled = _fields(first), world_prompts(), first.profile is not None
    del first  # which is let go when another is chosen

    def number(label: str, name: str, step: int) -> gr.Number:
        return gr.Number(label=label, precision=0, step=step, minimum=0, min_width=90, **own[name])

    with gr.Blocks(title="draftdiff", analytics_enabled=False) as page:
        gr.Markdown("# draftdiff\nDense and sparse attention on one prompt", elem_id="head")
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                model = gr.Dropdown(sessions.names, label="Model", elem_id="model")
                prompt = gr.Textbox(
                    prompts[0] if own[_EXAMPLES]["visible"] else "", label="Prompt", lines=2, elem_id="prompt"
                )
                examples = gr.Examples(
                    [[text] for text in prompts], prompt, label="Combinations it was not trained on", **own[_EXAMPLES]
                )
                choices = [_SPARSITY] + ([_PROFILE] if profiled else [])
                kind = gr.Radio(choices, value=choices[-1], label="Settings", visible=len(choices) > 1)
                sparsity = gr.Slider(
                    0,
                    0.95,
                    0.75,
                    step=0.05,
                    label="Sparsity",
                    info="share of attention that is skipped",
                    visible=len(choices) == 1,
                    elem_id="sparsity",
                )
                with gr.Row():
                    start = gr.Button("Run", variant="primary", min_width=120, scale=2, elem_id="run")
                    cancel = gr.Button("Cancel", min_width=120, scale=1, elem_id="cancel")
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90)
                    steps = number("Steps", "num_inference_steps", 1)
                    frames = number("Frames", "num_frames", 4)
                with gr.Row():
                    width, height = number("Width", "width", 16), number("Height", "height", 16)
            with gr.Column(scale=3, min_width=480):
                clips = gr.HTML(view.EMPTY, elem_id="clips")
                figures = gr.HTML(elem_id="figures")
        where = gr.HTML(elem_id="where")

        kind.change(lambda one: gr.update(visible=one == _SPARSITY), kind, sparsity, api_visibility="private")
        # One queue: a model is not let go while it runs.
        one_by_one: Any = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        shown = [examples.dataset, steps, frames, width, height]
        model.input(choose, model, shown, show_progress_on=clips, **one_by_one)
        made = gr.on(
            [start.click, prompt.submit],
            run,
            [model, prompt, kind, sparsity, seed, steps, frames, width, height],
            [clips, figures, where],
            show_progress_on=clips,
            trigger_mode="once",
            **one_by_one,
        )
        # One that waits is taken from the queue, one that runs ends before its next step.
        cancel.click(stop, queue=False, cancels=made, api_visibility="private")
    page.queue(default_concurrency_limit=1, max_size=32)
    return page


def _fields(session: Session) -> dict[str, dict[str, Any]]:
    """What the fields of a model show, those that its pipeline has: its own sizes, and examples of the embedded one."""
    defaults = {name: parameter.default for name, parameter in session.model.parameters.items()} | session.call
    fields: dict[str, dict[str, Any]] = {_EXAMPLES: {"visible": session.model.name == EMBEDDED}}
    for name in ("num_inference_steps", "num_frames", "width", "height"):
        value = defaults.get(name)
        fields[name] = {"value": value if isinstance(value, int) else None, "visible": name in defaults}
    return fields


def _plain(line: str) -> str:
    """A message of the command line without its dashes."""
    return line.replace(" --", " ").removeprefix("--")


class _Closed:
    """Answers 404 for what the page does not use, and tells the browser to stay on this site."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix("/gradio_api")
        if any(path.startswith(closed) for closed in _CLOSED):
            await PlainTextResponse("not found", 404)(scope, receive, send)
            return

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        await self._app(scope, receive, with_policy)


def app(sessions: Sessions, told: Callable[[Exception], str | None], host: str) -> FastAPI:
    """The page as a web application. host: where it listens; on this machine's own address no other name leads there,
    so that pages of other sites cannot reach it by one."""
    theme = gr.themes.Base(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    outer.add_middleware(_Closed)
    if is_local(host):
        outer.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", host])
    return gr.mount_gradio_app(
        outer,
        build(sessions, told),
        path="",
        server_name=host,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        theme=theme,
        css=view.STYLE,
        head=view.VIEWER,
    )


def is_local(host: str) -> bool:
    return host in ("127.0.0.1", "::1", "localhost")


class Server(uvicorn.Server):
    """Serves until it is interrupted. ready: called once it listens.  over: called when no more requests come, so that
    what still runs ends."""

    def __init__(
        self, application: FastAPI, host: str, port: int, ready: Callable[[], None], over: Callable[[], None]
    ) -> None:
        # Browsers keep connections open, for which it would wait.
        super().__init__(
            uvicorn.Config(application, host=host, port=port, log_level="error", ws="none", timeout_graceful_shutdown=1)
        )
        self._ready, self._over = ready, over

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: Any = None) -> None:
        self._over()
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # connections that are cut are no news
        await super().shutdown(sockets)
