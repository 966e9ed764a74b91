"""All readers that wait, and the thread that ends their waiting when its time is over."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fusecache.errors import CancelledReadError
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.waiter import Waiter, settle_waiters
from fusecache.fetch.worker_pool import Wakeups
from fusecache.locking import OwnedLock


class WaiterTable:
    """The waiters of one service that are not settled yet, each with the fetch at which it waits. `lock` is the
    scheduling lock.

    | State | Event | Next state |
    |---|---|---|
    | unknown | `add_locked` | waiting, here and at its fetch |
    | waiting | `drop_locked`, `cancel`, `close` | unknown, here and at its fetch |
    | waiting | `remove_locked`: its fetch has let go of it already | unknown |
    """

    def __init__(self, lock: OwnedLock, wakeups: Wakeups) -> None:
        self._lock = lock
        self._wakeups = wakeups
        self._fetches: dict[Waiter, ObjectFetch] = {}
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._fetches)

    def add_locked(self, object_fetch: ObjectFetch, waiter: Waiter) -> None:
        """`waiter` waits at this fetch. Raises the error that this version can't be had any more, and
        CancelledReadError when the mount goes away; then it does not wait."""
        self._lock.assert_held()
        if object_fetch.gone_error is not None or self._is_closed:
            raise object_fetch.gone_error or CancelledReadError("the mount is going away")
        self._fetches[waiter] = object_fetch
        object_fetch.waiters.add(waiter)
        if waiter.awaits_attestation:
            object_fetch.backoff.end()
        if len(self._fetches) == 1:
            self._wakeups.wake_clock_locked()

    def drop_locked(self, waiters: Iterable[Waiter]) -> None:
        """Neither this table nor their fetches know these any more; the caller settles them, unless they were
        cancelled."""
        self._lock.assert_held()
        for waiter in waiters:
            object_fetch = self._fetches.pop(waiter, None)
            if object_fetch is not None:
                object_fetch.waiters.drop(waiter)

    def remove_locked(self, waiters: Iterable[Waiter]) -> None:
        """Their fetches let go of these already, and the caller settles them."""
        self._lock.assert_held()
        for waiter in waiters:
            self._fetches.pop(waiter, None)

    def cancel(self, waiter: Waiter) -> bool:
        """The reader does not want it any more; returns False if it was, or is being, settled."""
        with self._lock:
            if waiter not in self._fetches:
                return False
            self.drop_locked([waiter])
            return True

    def is_waiting(self, waiter: Waiter) -> bool:
        """Whether it is not settled."""
        with self._lock:
            return waiter in self._fetches

    def fetch_of_locked(self, waiter: Waiter) -> ObjectFetch | None:
        """The fetch at which it waits; None: it does not."""
        self._lock.assert_held()
        return self._fetches.get(waiter)

    def pop_expired_locked(self, is_expired: Callable[[Waiter], bool]) -> list[Waiter]:
        """Drops the waiters whose time is over, and returns them to be settled."""
        self._lock.assert_held()
        expired = [waiter for waiter in self._fetches if is_expired(waiter)]
        self.drop_locked(expired)
        return expired

    def close(self) -> None:
        """Settle all waiters with CancelledReadError; from now on `add_locked` raises it."""
        with self._lock:
            self._is_closed = True
            waiters = list(self._fetches)
            self.drop_locked(waiters)
        settle_waiters(waiters, CancelledReadError("the mount is going away"))
