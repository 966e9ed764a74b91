"""A counting lock whose size may change while it is used."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

from fusecache.errors import CancelledReadError, UnavailableError

_POLL = 0.1
"""Seconds between looks at `cancelled`, and at whether the size has grown: nothing else can wake us for those."""


class Slots:
    """At most `size()` holders at a time, first come, first served. Thread-safe; while its lock is held nothing but
    `size` is called."""

    def __init__(self, size: Callable[[], int]) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._held = 0
        self._waiting: deque[threading.Event] = deque()
        """Who is given a slot leaves it, and finds the event set."""

    @contextlib.contextmanager
    def hold(
        self, clock: Callable[[], float], deadline: float, cancelled: Callable[[], bool]
    ) -> Iterator[None]:
        """Wait for a slot until `deadline` on `clock`. Raises UnavailableError, CancelledReadError."""
        if not self.take(clock, deadline, cancelled):
            if cancelled():
                raise CancelledReadError("the reader went away")
            raise UnavailableError("no turn at the origin before the deadline")
        try:
            yield
        finally:
            self.give_back()

    def take(self, clock: Callable[[], float], deadline: float, cancelled: Callable[[], bool]) -> bool:
        """Whether there was a slot before `deadline` on `clock`, and before `cancelled`. Then give it back."""
        turn = threading.Event()
        with self._lock:
            self._waiting.append(turn)
            self._admit()
        while not turn.is_set() and not cancelled() and (left := deadline - clock()) > 0:
            if not turn.wait(min(left, _POLL)):
                with self._lock:
                    self._admit()
        with self._lock:
            if not turn.is_set():
                self._waiting.remove(turn)
        return turn.is_set()

    def give_back(self) -> None:
        """One that was taken."""
        with self._lock:
            self._held -= 1
            self._admit()

    def _admit(self) -> None:
        """Give what is free to those who wait longest; the lock is held."""
        while self._waiting and self._held < self._size():
            self._held += 1
            self._waiting.popleft().set()
