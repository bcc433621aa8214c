"""A user's mistake is one clean line, whoever words it."""

import pytest

from draftdiff.errors import UserError, one_line, printable, user_errors


def test_a_users_mistake_is_one_line_even_about_a_value_of_several():
    assert str(UserError("got tensor([[1.],\n        [2.]])")) == "got tensor([[1.], [2.]])"
    with pytest.raises(UserError, match=r"^first second$"), user_errors(KeyError, OSError):
        raise OSError("first\nsecond")


def test_a_librarys_message_becomes_one_line_without_colours_and_dangerous_advice():
    assert one_line(ValueError("\x1b[1mone\x1b[0m\n\n  two\tthree")) == "one two three"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 1000))) == 300
    assert one_line(ValueError("pass trust_remote_code=True")) == "it needs code of its own, which is not run"
    assert "weights_only" not in one_line(ValueError("set weights_only=False and it will likely succeed"))


def test_what_would_steer_a_terminal_is_masked():
    assert printable("a\x1b[31m\x07\x1fb\n\tä") == "a?[31m??b\n\tä"
