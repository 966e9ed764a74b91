"""Sealed objects in the loader: who waits for one, and when the inspector is to look at it.

An object is sealed as long as nobody vouched for all of its bytes (see store.seals). Its blocks are fetched, stored and
passed on to other nodes, which look for themselves, like any others; but a reader waits until all of them are there and
were looked at. Looking begins while they arrive. All of it is guarded by the loader's lock, but for `look`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fusecache.errors import AttestationError, FusecacheError, StoreError
from fusecache.fetch.interface import Inspector
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.scheduler import FetchScheduler
from fusecache.fetch.waiter import Waiter, settle_waiters


class AttestationGate:
    """Of one loader, whose `lock` and `waiters` these are. `completed` is told of loads that were opened up,
    `closable` asked whether one is to be closed."""

    def __init__(
        self,
        lock: threading.Lock,
        waiters: set[Waiter],
        scheduler: FetchScheduler,
        inspector: Inspector | None,
        *,
        stall_timeout: float,
        on_attested: Callable[[ObjectFetch], None],
        remove_if_unused_locked: Callable[[ObjectFetch], bool],
    ) -> None:
        self.last_progress_at = 0.0
        """When something landed, or was looked at, the last time."""
        self._lock = lock
        self._waiters = waiters
        self._scheduler = scheduler
        self._inspector = inspector
        self._stall_timeout = stall_timeout
        self._on_attested = on_attested
        self._remove_if_unused_locked = remove_if_unused_locked

    def refuse_if_quarantined(self, object_fetch: ObjectFetch) -> None:
        """A new load: one that is in quarantine is not fetched."""
        if object_fetch.stored.attestation.quarantine_sha256 is not None:
            text = f"{object_fetch.version.key} is in quarantine: it is not what its manifest says"
            object_fetch.gone_error = AttestationError(text)

    def begin_inspection_locked(self, object_fetch: ObjectFetch) -> bool:
        """Under the lock; to be followed by `look` without it."""
        if self._inspector is None or not object_fetch.needs_inspection():
            return False
        object_fetch.is_being_inspected = True
        object_fetch.flight_count += 1
        return True

    def request_inspection(self, object_fetch: ObjectFetch, has_begun: bool) -> None:
        """Have the inspector look, if it shall."""
        if has_begun and self._inspector is not None:
            self._inspector.request_inspection(object_fetch)

    def inspection_ended(
        self, object_fetch: ObjectFetch, is_finished: bool, error: FusecacheError | None = None
    ) -> None:
        """The inspector has looked at what was there. `done`: at all of it, and it may be given to anybody, or not
        because of `error`. Takes the lock."""
        with self._lock:
            object_fetch.is_being_inspected = False
            object_fetch.flight_count -= 1
            self.last_progress_at = time.monotonic()
            if object_fetch.stored.attestation.quarantine_sha256 is not None:
                object_fetch.gone_error = error
                self._scheduler.drop_file(object_fetch)
            waiters = self.pop_waiters_locked(object_fetch) if is_finished else []
            shall = self.begin_inspection_locked(object_fetch)
            closing = self._remove_if_unused_locked(object_fetch)
        settle_waiters(waiters, error)
        if is_finished and error is None:
            self._on_attested(object_fetch)
        self.request_inspection(object_fetch, shall)
        if closing:
            object_fetch.stored.close()

    def lift_quarantine(self, object_fetch: ObjectFetch) -> None:
        """Its quarantine is over: it may be fetched again. Takes the lock."""
        object_fetch.stored.attestation.lift_quarantine()
        with self._lock:
            object_fetch.gone_error = None

    def fail_waiters_without_space(self, object_fetch: ObjectFetch) -> None:
        """What was fetched of it can't be stored, so that it will never be whole. Takes the lock."""
        with self._lock:
            waiters = self.pop_waiters_locked(object_fetch)
        text = f"{object_fetch.version.key} can't be checked: the cache has no room for all of it, or its disk fails"
        settle_waiters(waiters, StoreError(text))

    def pop_waiters_locked(self, object_fetch: ObjectFetch) -> list[Waiter]:
        """Under the lock: all who wait at the gate, to be settled."""
        waiters, object_fetch.attestation_waiters = object_fetch.attestation_waiters, []
        self._waiters.difference_update(waiters)
        return waiters

    def is_expired_locked(self, waiter: Waiter, now: float) -> bool:
        """Under the lock: whether a waiter's time is over. At the gate, where a whole file is waited for, it is not as
        long as anything moves."""
        object_fetch = waiter.object_fetch
        if waiter in object_fetch.attestation_waiters and (
            object_fetch.is_being_inspected or object_fetch in self._scheduler.whole_files
        ):
            return max(waiter.deadline, self.last_progress_at + self._stall_timeout) <= now
        return waiter.deadline <= now
