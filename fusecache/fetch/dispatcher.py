"""Work goes into the scheduler, and the threads that may do it are woken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.read_observer import ReadObserver
from fusecache.fetch.scheduler import FetchScheduler
from fusecache.fetch.worker_pool import Wakeups
from fusecache.locking import OwnedLock
from fusecache.types import ObjectVersion


class WorkDispatcher:
    """Puts work of one service into its `scheduler`. `lock` is the scheduling lock; methods without `_locked` take it.
    `fetches_whole_files`: readers of a part have all of the file fetched."""

    def __init__(
        self,
        lock: OwnedLock,
        scheduler: FetchScheduler,
        wakeups: Wakeups,
        *,
        observer: ReadObserver,
        fetches_whole_files: bool,
    ) -> None:
        self._lock = lock
        self._scheduler = scheduler
        self._wakeups = wakeups
        self._observer = observer
        self._fetches_whole_files = fetches_whole_files

    def queue_demand_locked(
        self, object_fetch: ObjectFetch, blocks: Iterable[int], *, is_header: bool = False
    ) -> None:
        """These blocks have a waiter; `is_header`: they hold a header, and no reader waits."""
        self._lock.assert_held()
        if self._scheduler.demand.queue_blocks(object_fetch, blocks, is_header=is_header):
            self._wakeups.wake_for_demand_locked()

    def want_whole_file_locked(self, object_fetch: ObjectFetch) -> None:
        """A reader reads this file: fetch all of it, unless readers have no files fetched whole, and not before the
        observer of reads lets it."""
        self._lock.assert_held()
        if not self._fetches_whole_files:
            return
        seconds = self._observer.hold_back_locked(object_fetch)
        if seconds > 0.0:
            object_fetch.backoff.hold(time.monotonic() + seconds)
            self.recheck_at_locked(object_fetch.backoff.until, object_fetch, range(0))
        self.add_whole_file_locked(object_fetch)

    def add_whole_file_locked(self, object_fetch: ObjectFetch) -> None:
        """Fetch all of this file."""
        self._lock.assert_held()
        if self._scheduler.prefetches.add_whole_file(object_fetch):
            self.wake_locked()

    def recheck_at_locked(self, due: float, object_fetch: ObjectFetch, blocks: range) -> None:
        """Look at `due`, a time.monotonic(), whether these blocks, in flight and not arrived, are there; without
        blocks: look then for something to fetch."""
        self._lock.assert_held()
        self._scheduler.timed.schedule_recheck(due, object_fetch, blocks)
        self._wakeups.wake_clock_locked()

    def run_at_locked(self, due: float, task: Callable[[], None]) -> None:
        """Have this done by a thread at `due`, a time.monotonic()."""
        self._lock.assert_held()
        self._scheduler.timed.schedule_task(due, task)
        self._wakeups.wake_clock_locked()

    def run_soon_locked(self, task: Callable[[], None]) -> None:
        """Have this done soon, by a thread that fetches."""
        self._lock.assert_held()
        self._scheduler.timed.tasks.append(task)
        self._wakeups.wake_one_locked()

    def run_soon(self, task: Callable[[], None]) -> None:
        """Have this done soon, by a thread that fetches."""
        with self._lock:
            self.run_soon_locked(task)

    def plan_files(self, versions: Iterable[tuple[ObjectVersion, str]]) -> None:
        """Fetch all of these versions (of these sources), in this order, without a reader."""
        with self._lock:
            self._scheduler.prefetches.plan_files(versions)
            self.wake_locked()

    def pause_prefetch(self) -> None:
        """No more flights without a waiter, from now on and for good."""
        with self._lock:
            self._scheduler.pause_prefetch()

    def wake_due_locked(self, now: float) -> None:
        """Queue what waited for its time until `now`."""
        self._lock.assert_held()
        for object_fetch, blocks in self._scheduler.timed.pop_due_rechecks(now):
            self.queue_demand_locked(object_fetch, object_fetch.return_blocks(blocks))
            self._wakeups.wake_one_locked(remote_too=True)
        if self._scheduler.timed.tasks:
            self._wakeups.wake_one_locked()

    def wake_locked(self) -> None:
        """There is a lot to fetch without a waiter, or an earlier time to keep."""
        self._lock.assert_held()
        self._wakeups.wake_for_prefetch_locked()
        self._wakeups.wake_clock_locked()
