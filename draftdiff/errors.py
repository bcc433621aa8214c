"""A mistake of the user, told apart from a bug: the command line shows it in one line, a bug with its traceback."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A value, file or model that cannot be used; the message names it and what is allowed, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.splitlines()))  # of a tensor's repr, say


class NotWritten(OSError):
    """A file or folder that could not be written, for a full disk say. What was there before is there still."""


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Around a check of what the user gave: its errors of these kinds, by default ValueError, become UserErrors.

    Around the check alone: within, a bug of the same kind would pass for the user's mistake.
    """
    caught = kinds or (ValueError,)
    try:
        yield
    except (UserError, NotWritten):
        raise
    except caught as error:
        raise UserError(str(error)) from error


# What libraries advise and nobody should do, by a word of the advice; in its place what is the matter.
_UNSAFE_ADVICE = {
    "trust_remote_code": "it needs code of its own, which is not run",
    "weights_only": "it is damaged, or holds more than weights, which could run code and is not loaded",
}


def printable(text: str) -> str:
    """A text, of a damaged file say, without what would steer a terminal."""
    return "".join(letter if letter.isprintable() or letter in "\t\r\n" else "?" for letter in text)


def one_line(error: Exception) -> str:
    """An exception's message without line breaks and colours, cut where it grows long; never one that advises to switch
    a safety off."""
    text = " ".join(printable(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(error))).split()) or type(error).__name__
    text = next((said for word, said in _UNSAFE_ADVICE.items() if word in text), text)
    return text if len(text) <= 300 else text[:297] + "..."
