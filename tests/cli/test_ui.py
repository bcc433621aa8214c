"""`draftdiff ui` tells what is missing before it loads a model."""

import socket
from importlib.machinery import ModuleSpec

import pytest

from draftdiff.cli import ui
from draftdiff.errors import UserError
from tests.cli.one_line import fails_in_one_line


@pytest.fixture(autouse=True)
def _no_model(monkeypatch):
    monkeypatch.setattr(ui, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(ui, "find_spec", lambda name: ModuleSpec(name, None))


def test_without_gradio_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr(ui, "find_spec", lambda _: None)
    assert "draftdiff ui needs gradio: pip install 'draftdiff[ui]'" in fails_in_one_line(capsys, "ui")


def test_a_port_that_is_taken_is_told(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = fails_in_one_line(capsys, "ui", "--port", port)
    assert f"cannot listen on --host '127.0.0.1' --port {port}: " in told


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--host", "no.such.host.invalid"], "cannot listen on --host 'no.such.host.invalid'"),
        (["--port", "70000"], "must be a whole number from 0 to 65535, got '70000'"),
        (["--port", "0", "--profile", "nowhere.json"], "nowhere.json"),
        (["--port", "0", "--tokens", "-1"], "tokens must be a number of tokens"),
    ],
)
def test_what_cannot_be_served_is_one_line(capsys, argv, told):
    assert told in fails_in_one_line(capsys, "ui", *argv)


def test_an_open_port_is_found():
    assert 0 < ui._free("127.0.0.1", 0) < 65536


def test_models_are_offered_beside_the_embedded_one_and_the_first_is_loaded(monkeypatch):
    from draftdiff.cli import main

    loaded = []

    def load(options, configs):
        loaded.append((options.model, [config.min_tokens for config in configs]))
        raise UserError("enough")

    monkeypatch.setattr(ui, "load_model", load)
    offered = []

    class Watched(ui.Sessions):
        def __init__(self, make):
            super().__init__(make)
            offered.append(self)

    monkeypatch.setattr(ui, "Sessions", Watched)
    assert main(["ui", "--port", "0", "--model", "one", "--model", "two"]) != 0
    (sessions,) = offered
    assert sessions.names == ["one", "two", "the embedded model"]
    for name in sessions.names[1:]:
        with pytest.raises(UserError, match="enough"):
            sessions.of(name)
    # The embedded model's few tokens are sparse, too.
    assert loaded == [("one", [None]), ("two", [None]), (None, [0])]
