"""Models of the page: loaded when asked for, one at a time, and what cannot be loaded is told each time."""

import weakref

import pytest

from draftdiff.errors import UserError
from draftdiff.ui.sessions import Sessions


class Held:
    """Stands in for a session, with a pipeline's circle of references."""

    def __init__(self):
        self.itself, self.cancelled = self, []

    def cancel(self, visitor):
        self.cancelled.append(visitor)

    def cancel_all(self):
        self.cancelled.append("all")


def test_a_model_is_loaded_when_it_is_asked_for_and_kept_until_another_is():
    loaded = []

    def load(name):
        loaded.append(name)
        return Held()

    sessions = Sessions({name: lambda name=name: load(name) for name in ("a", "b")})
    assert sessions.names == ["a", "b"] and not loaded
    assert sessions.of("a") is sessions.of("a")
    assert loaded == ["a"]
    sessions.of("b")
    sessions.of("a")
    assert loaded == ["a", "b", "a"]


def test_a_model_is_let_go_before_the_next_is_loaded():
    held = []

    def load():
        assert all(one() is None for one in held)
        made = Held()
        held.append(weakref.ref(made))
        return made

    sessions = Sessions({"a": load, "b": load})
    for name in ("a", "b", "a"):
        sessions.of(name)
    assert len(held) == 3


def test_what_cannot_be_loaded_is_told_each_time_and_the_others_go_on():
    def fail():
        raise UserError("no such file")

    sessions = Sessions({"a": Held, "broken": fail})
    for _ in range(2):
        with pytest.raises(UserError, match="no such file"):
            sessions.of("broken")
    assert isinstance(sessions.of("a"), Held)
    with pytest.raises(UserError, match="model must be one of a, broken, got 'c'"):
        sessions.of("c")


def test_cancel_reaches_the_model_that_is_held():
    sessions = Sessions({"a": Held})
    sessions.cancel("me")
    sessions.cancel_all()
    held = sessions.of("a")
    sessions.cancel("me")
    sessions.cancel_all()
    assert held.cancelled == ["me", "all"]
