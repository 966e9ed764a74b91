"""A counting lock whose size may change while it is used."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

from fusecache.errors import CancelledReadError, UnavailableError

_POLL_SECONDS = 0.1
"""Seconds between looks at `cancelled`, and at whether the size has grown: nothing else can wake us for those."""


class ResizableSemaphore:
    """At most `size()` holders at a time, first come, first served. Thread-safe; while its lock is held nothing but
    `size` is called."""

    def __init__(self, size: Callable[[], int]) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._held_count = 0
        self._waiting_events: deque[threading.Event] = deque()
        """Who is given a slot leaves it, and finds the event set."""

    @contextlib.contextmanager
    def hold_slot(
        self, clock: Callable[[], float], deadline: float, cancelled: Callable[[], bool]
    ) -> Iterator[None]:
        """Wait for a slot until `deadline` on `clock`. Raises UnavailableError, CancelledReadError."""
        if not self.take_slot(clock, deadline, cancelled):
            if cancelled():
                raise CancelledReadError("the reader went away")
            raise UnavailableError("no turn at the origin before the deadline")
        try:
            yield
        finally:
            self.return_slot()

    def take_slot(self, clock: Callable[[], float], deadline: float, cancelled: Callable[[], bool]) -> bool:
        """Whether there was a slot before `deadline` on `clock`, and before `cancelled`. Then give it back."""
        turn = threading.Event()
        with self._lock:
            self._waiting_events.append(turn)
            self._admit_waiters_locked()
        while not turn.is_set() and not cancelled() and (left := deadline - clock()) > 0:
            if not turn.wait(min(left, _POLL_SECONDS)):
                with self._lock:
                    self._admit_waiters_locked()
        with self._lock:
            if not turn.is_set():
                self._waiting_events.remove(turn)
        return turn.is_set()

    def return_slot(self) -> None:
        """One that was taken."""
        with self._lock:
            self._held_count -= 1
            self._admit_waiters_locked()

    def _admit_waiters_locked(self) -> None:
        """Give what is free to those who wait longest; the lock is held."""
        while self._waiting_events and self._held_count < self._size():
            self._held_count += 1
            self._waiting_events.popleft().set()
