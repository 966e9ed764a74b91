"""How many requests may be in flight: halved when the origin throttles, grown slowly when it does not (AIMD).

A slot is taken per request. A request that was sent before the last halving does not halve again: its 503 is news
about the old rate. Each success adds 1/limit, so one round of requests adds one slot.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from fusecache.errors import CancelledReadError, UnavailableError

_POLL = 0.1
"""Seconds between looks at `cancelled`, which nothing can wake us for."""


class Limiter:
    """An adaptive semaphore. Its lock is a leaf: nothing is called while it is held."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = float(most)
        self._busy = 0
        self._generation = 0  # counts halvings
        self._changed = threading.Condition(threading.Lock())

    @property
    def limit(self) -> int:
        """Most requests in flight at this time."""
        return int(self._limit)

    @contextlib.contextmanager
    def slot(self, where: str, deadline: float, cancelled: Callable[[], bool]) -> Iterator[int]:
        """Hold a slot; gives the generation to tell `throttled`. Raises UnavailableError, CancelledReadError."""
        with self._changed:
            while self._busy >= int(self._limit):
                if cancelled():
                    raise CancelledReadError(f"{where}: the reader went away")
                left = deadline - time.monotonic()
                if left <= 0:
                    raise UnavailableError(
                        f"{where}: no request could be sent before the deadline: the origin is overloaded"
                    )
                self._changed.wait(min(left, _POLL))
            self._busy += 1
            generation = self._generation
        try:
            yield generation
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify()

    def throttled(self, generation: int) -> None:
        """A request of this generation was told to slow down."""
        with self._changed:
            if generation == self._generation:
                self._generation += 1
                self._limit = max(1.0, self._limit / 2)

    def succeeded(self) -> None:
        """A request was answered in full."""
        with self._changed:
            if self._limit < self._most:
                self._limit = min(float(self._most), self._limit + 1 / self._limit)
                self._changed.notify()
