"""What loading and calling any model has in common: its errors are told in one line, whoever raises them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from draftdiff.errors import UserError, one_line, user_errors
from draftdiff.hosts.custom_code import never_asked
from draftdiff.stored import lfs_pointer


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Around the loading of a model: whatever it raises becomes a UserError that names the model, and no question is
    asked."""
    try:
        with never_asked():
            yield
    except UserError:
        raise
    except Exception as error:  # the hub, transformers and safetensors each have their own
        raise UserError(f"model {name!r} cannot be loaded: {lfs_pointer(name) or one_line(error)}") from error


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Without diffusers' warnings: what fails is said once, by us."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def inputs_refused(pipeline: Any) -> Iterator[None]:
    """Around calls of a pipeline: what its own `check_inputs` refuses becomes a UserError, and nothing else does."""
    check = getattr(pipeline, "check_inputs", None)
    if check is None:
        yield
        return

    @wraps(check)
    def told(*args: Any, **kwargs: Any) -> Any:
        with user_errors():
            return check(*args, **kwargs)

    pipeline.check_inputs = told
    try:
        yield
    finally:
        del pipeline.check_inputs
