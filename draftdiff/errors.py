"""A mistake of the user, told apart from a bug: the command line shows it in one line, a bug with its traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A value, file or model that cannot be used; the message names it and what is allowed."""


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
