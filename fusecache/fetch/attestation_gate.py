"""Unattested objects: which readers wait for an attestation, and when an inspector is to look at an object.

An object is unattested until an inspector found all of its bytes to be what its manifest says. Its blocks are fetched,
stored and passed on to other nodes, which look for themselves, like any others; but a reader waits until all of them
are there and were inspected. Inspection begins while they arrive.

| Object | Event | Next state |
|---|---|---|
| not inspected | more blocks are there than were hashed, or a reader waits and all are hashed | queued |
| queued | an inspector takes it | under inspection |
| under inspection | `inspection_ended`, unfinished | not inspected, or queued again |
| under inspection | `inspection_ended`, finished without an error | attested: its waiters are settled |
| under inspection | `inspection_ended` with an error | not inspected, or in quarantine: its waiters get the error |
| in quarantine | `lift_quarantine` | not inspected |
"""

from __future__ import annotations

import time

from fusecache.errors import FusecacheError, StoreError
from fusecache.events import EventHub
from fusecache.fetch.attestation_queue import AttestationQueue
from fusecache.fetch.fetch_table import FetchTable
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.prefetch_queues import PrefetchQueues
from fusecache.fetch.waiter import Waiter, settle_waiters
from fusecache.fetch.waiter_table import WaiterTable
from fusecache.locking import OwnedLock


class AttestationGate:
    """Of one service, whose scheduling lock is `lock`; methods without `_locked` take it. Without a `queue` no object
    is inspected. An attestation waiter's time is not over before `stall_timeout` seconds without any progress."""

    def __init__(
        self,
        lock: OwnedLock,
        queue: AttestationQueue | None,
        *,
        waiters: WaiterTable,
        fetches: FetchTable,
        prefetches: PrefetchQueues,
        events: EventHub,
        stall_timeout: float,
    ) -> None:
        self._lock = lock
        self._queue = queue
        self._waiters = waiters
        self._fetches = fetches
        self._prefetches = prefetches
        self._events = events
        self._stall_timeout = stall_timeout
        self._last_progress_at = 0.0
        """When a block of any object arrived, or an inspection ended, the last time; a time.monotonic()."""

    def note_progress_locked(self, now: float) -> None:
        """A block arrived, or an inspection ended."""
        self._lock.assert_held()
        self._last_progress_at = now

    def request_inspection_locked(self, object_fetch: ObjectFetch) -> None:
        """Have an inspector look at it, if there is more to look at than was, or a reader waits for the last look."""
        self._lock.assert_held()
        if self._queue is not None and _needs_inspection(object_fetch):
            object_fetch.inspection.begin()
            self._queue.put(object_fetch)

    def inspection_ended(
        self, object_fetch: ObjectFetch, is_finished: bool, error: FusecacheError | None = None
    ) -> None:
        """An inspector has looked at the blocks that were there. `is_finished`: at all of them, and the object is
        attested, or it may not be given to any reader because of `error`."""
        with self._lock:
            object_fetch.inspection.end()
            self.note_progress_locked(time.monotonic())
            if object_fetch.stored.attestation.quarantine_sha256 is not None:
                object_fetch.give_up(error)
                self._prefetches.drop_file(object_fetch)
            waiters = self._pop_waiters_locked(object_fetch) if is_finished else []
            self.request_inspection_locked(object_fetch)
            is_removed = self._fetches.remove_if_unused_locked(object_fetch)
        settle_waiters(waiters, error)
        if is_finished and error is None:
            self._events.object_completed.publish(object_fetch.version)
        if is_removed:
            object_fetch.stored.close()

    def lift_quarantine(self, object_fetch: ObjectFetch) -> None:
        """Its manifest says by now what was found: it may be fetched again."""
        object_fetch.stored.attestation.lift_quarantine()
        with self._lock:
            object_fetch.give_up(None)

    def fail_waiters_without_space(self, object_fetch: ObjectFetch) -> None:
        """Blocks that were fetched of it can't be stored, so that it will never be complete: its readers get
        StoreError."""
        with self._lock:
            waiters = self._pop_waiters_locked(object_fetch)
        text = f"{object_fetch.version.key} can't be checked: the cache has no room for all of it, or its disk fails"
        settle_waiters(waiters, StoreError(text))

    def _pop_waiters_locked(self, object_fetch: ObjectFetch) -> list[Waiter]:
        """All readers that wait for the attestation, which the caller settles."""
        waiters = object_fetch.waiters.pop_attestation()
        self._waiters.remove_locked(waiters)
        return waiters

    def is_expired_locked(self, waiter: Waiter, now: float) -> bool:
        """Whether a waiter's time is over. One that waits for an attestation, and so for a whole file, has time as long
        as anything moves."""
        self._lock.assert_held()
        object_fetch = self._waiters.fetch_of_locked(waiter)
        if (
            object_fetch is not None
            and waiter in object_fetch.waiters.of_attestation
            and (object_fetch.inspection.is_under_way or object_fetch in self._prefetches.whole_files)
        ):
            return max(waiter.deadline, self._last_progress_at + self._stall_timeout) <= now
        return waiter.deadline <= now


def _needs_inspection(object_fetch: ObjectFetch) -> bool:
    """Whether more of an unattested object is there than was hashed, or a reader waits for the last look at it."""
    stored, inspection = object_fetch.stored, object_fetch.inspection
    if (
        not stored.is_unattested
        or object_fetch.inspection.is_under_way
        or object_fetch.gone_error is not None
    ):
        return False
    hashed = inspection.hashed_blocks if inspection.discards == stored.blocks.bad_block_count else 0
    return (
        stored.is_present(hashed)
        if hashed < stored.block_count
        else bool(object_fetch.waiters.of_attestation)
    )
