"""A counting lock whose size may change while it is used."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

from fusecache.errors import CancelledReadError, UnavailableError


class Slots:
    """At most `size()` holders at a time, first come, first served. Thread-safe."""

    def __init__(self, size: Callable[[], int]) -> None:
        self._size = size
        self._condition = threading.Condition()
        self._queue: deque[object] = deque()
        self._held = 0

    @contextlib.contextmanager
    def hold(
        self, clock: Callable[[], float], deadline: float, cancelled: Callable[[], bool]
    ) -> Iterator[None]:
        """Wait for a slot until `deadline` on `clock`. Raises UnavailableError, CancelledReadError."""
        ticket = object()
        with self._condition:
            self._queue.append(ticket)
            try:
                while self._queue[0] is not ticket or self._held >= self._size():
                    if cancelled():
                        raise CancelledReadError("the reader went away")
                    if clock() >= deadline:
                        raise UnavailableError("no turn at the origin before the deadline")
                    self._condition.wait(0.25)
                self._held += 1
            finally:
                self._queue.remove(ticket)
                self._condition.notify_all()
        try:
            yield
        finally:
            with self._condition:
                self._held -= 1
                self._condition.notify_all()
