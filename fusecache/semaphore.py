"""A counting lock whose size may change while it is used, and a wait that can be cancelled."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

from fusecache.errors import CancelledReadError, UnavailableError
from fusecache.locking import OwnedLock

_POLL_SECONDS = 0.1
"""Seconds between two calls of `cancelled`: nothing tells a waiting thread that its reader has gone away."""


def wait_cancellable(
    event: threading.Event,
    clock: Callable[[], float],
    deadline: float,
    cancelled: Callable[[], bool],
    on_poll: Callable[[], None] | None = None,
) -> bool:
    """Wait until `event` is set, `deadline` has come on `clock`, or `cancelled()` is true; returns whether the event is
    set. Calls `cancelled`, and then `on_poll` if it is given, about every 0.1 s."""
    while not event.is_set() and not cancelled() and (left := deadline - clock()) > 0:
        if not event.wait(min(left, _POLL_SECONDS)) and on_poll is not None:
            on_poll()
    return event.is_set()


class ResizableSemaphore:
    """At most `size()` holders at a time, first come, first served. Thread-safe; the lock guards the count of slots
    that are held and the queue, and `size` is called while it is held.

    | What happens | A thread |
    |---|---|
    | it asks for a slot | is at the end of the queue |
    | a slot is free and it is the first in the queue | leaves the queue and holds the slot |
    | its deadline comes, or its reader goes away | leaves the queue without a slot |
    | it returns its slot | holds none; the first in the queue is next |

    When `size()` grows, threads that wait notice it within 0.1 s.
    """

    def __init__(self, size: Callable[[], int]) -> None:
        self._size = size
        self._lock = OwnedLock()
        self._held_count = 0
        self._waiting_events: deque[threading.Event] = deque()
        """One event per waiting thread; it is set when the thread is given a slot."""

    @contextlib.contextmanager
    def hold_slot(
        self,
        clock: Callable[[], float],
        deadline: float,
        cancelled: Callable[[], bool],
        where: str = "the origin",
    ) -> Iterator[None]:
        """A with block that holds a slot. Waits for it until `deadline` on `clock`; raises UnavailableError then, and
        CancelledReadError when `cancelled()` is true before. `where` is the origin, or the URL, for the message."""
        if not self.take_slot(clock, deadline, cancelled):
            if cancelled():
                raise CancelledReadError(f"{where}: the reader went away")
            raise UnavailableError(
                f"{where}: no request could be sent before the deadline: the origin is overloaded"
            )
        try:
            yield
        finally:
            self.return_slot()

    def take_slot(self, clock: Callable[[], float], deadline: float, cancelled: Callable[[], bool]) -> bool:
        """Wait for a slot until `deadline` on `clock`, or until `cancelled()`; returns whether this thread holds one
        now, which it has to give back with `return_slot`."""
        turn = threading.Event()
        with self._lock:
            self._waiting_events.append(turn)
            self._admit_waiters_locked()
        wait_cancellable(turn, clock, deadline, cancelled, self._admit_waiters)
        with self._lock:
            if not turn.is_set():
                self._waiting_events.remove(turn)
        return turn.is_set()

    def return_slot(self) -> None:
        """Give back a slot that `take_slot` gave."""
        with self._lock:
            self._held_count -= 1
            self._admit_waiters_locked()

    def _admit_waiters(self) -> None:
        with self._lock:
            self._admit_waiters_locked()

    def _admit_waiters_locked(self) -> None:
        """Give the free slots to the threads that have waited longest."""
        self._lock.assert_held()
        while self._waiting_events and self._held_count < self._size():
            self._held_count += 1
            self._waiting_events.popleft().set()
