"""What several generations at once may read and change, such as a table that learns."""

from __future__ import annotations

import threading
from typing import Any


class Locked:
    """Has a lock of its own, which copies and pickles leave out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()
