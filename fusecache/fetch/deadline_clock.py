"""The thread that keeps the deadlines of waiters, and the times at which put-off work is due."""

from __future__ import annotations

import threading
import time

from fusecache.errors import UnavailableError
from fusecache.fetch.attestation_gate import AttestationGate
from fusecache.fetch.dispatcher import WorkDispatcher
from fusecache.fetch.timed_work import TimedWork
from fusecache.fetch.waiter import settle_waiters
from fusecache.fetch.waiter_table import WaiterTable
from fusecache.fetch.worker_pool import Wakeups
from fusecache.locking import OwnedLock

_WAITER_CHECK_SECONDS = 0.5
"""Seconds between looks at the deadlines, as long as there are waiters."""


class DeadlineClock:
    """Of one service, whose scheduling lock is `lock`. `deadline` is what waiters were given, in seconds."""

    def __init__(
        self,
        lock: OwnedLock,
        wakeups: Wakeups,
        *,
        waiters: WaiterTable,
        timed: TimedWork,
        dispatcher: WorkDispatcher,
        gate: AttestationGate,
        deadline: float,
    ) -> None:
        self._lock = lock
        self._wakeups = wakeups
        self._waiters = waiters
        self._timed = timed
        self._dispatcher = dispatcher
        self._gate = gate
        self._deadline = deadline
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="fetch-clock", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop_locked(self) -> None:
        """End the thread soon."""
        self._lock.assert_held()
        self._is_stopping = True
        self._wakeups.wake_clock_locked()

    def join(self, deadline: float) -> None:
        """Wait for its end, at most until `deadline`, a time.monotonic()."""
        if self._thread.is_alive():
            self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._is_stopping:
                    return
                now = time.monotonic()
                self._dispatcher.wake_due_locked(now)
                expired = self._waiters.pop_expired_locked(
                    lambda waiter, now=now: self._gate.is_expired_locked(waiter, now)  # type: ignore[misc]
                )
                if not expired:
                    self._wakeups.clock.wait(self._seconds_to_next(now))
                    continue
            for waiter in expired:
                text = f"{waiter.key}: not within the deadline of {self._deadline:g} s"
                settle_waiters([waiter], UnavailableError(text))

    def _seconds_to_next(self, now: float) -> float | None:
        """How long there is nothing to do; None: until it is woken."""
        pause = _WAITER_CHECK_SECONDS if len(self._waiters) else None
        due = self._timed.next_due_at
        if due is None:
            return pause
        return max(0.001, min(due - now, pause or due - now))
