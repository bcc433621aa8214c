"""The page's models by name, each loaded when it is first asked for."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from draftdiff.errors import UserError

if TYPE_CHECKING:
    from draftdiff.ui.session import Session


class Sessions:
    """One session is held at a time: where one model fits, two need not. make: what loads the model of a name."""

    def __init__(self, make: Mapping[str, Callable[[], Session]]) -> None:
        self._make = make
        self._held: tuple[str, Session] | None = None
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        return list(self._make)

    def of(self, name: str) -> Session:
        """Raises UserError for a model that is not offered or cannot be loaded."""
        if name not in self._make:
            raise UserError(f"model must be one of {', '.join(self._make)}, got {name!r}")
        with self._lock:
            if self._held is None or self._held[0] != name:
                self._held = None
                gc.collect()  # pipelines refer to themselves; the memory is needed now
                self._held = name, self._make[name]()
            return self._held[1]

    def cancel(self, visitor: str) -> None:
        """Stop the run of a visitor before its next step; nothing if there is none."""
        if self._held is not None:
            self._held[1].cancel(visitor)

    def cancel_all(self) -> None:
        if self._held is not None:
            self._held[1].cancel_all()
