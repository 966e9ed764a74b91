"""The threads that fetch, in groups: for blocks of other nodes or for all the rest, and of each a part that only takes
blocks with a reader.

The scheduling lock guards what they take their work from; each group sleeps on a condition of its own over it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from fusecache.locking import OwnedLock

_log = logging.getLogger(__name__)

NextWork = Callable[[bool, bool], Callable[[], None] | None]
"""next_work_locked(demand_only, remote): what a thread does next, None: nothing now. Called with the lock; the work is
called without it."""


class Wakeups:
    """Wakes the threads for which there is work. `lock` is the scheduling lock, which all callers hold."""

    def __init__(self, lock: OwnedLock) -> None:
        self.general = lock.new_condition()
        self.demand = lock.new_condition()
        self.remote = lock.new_condition()
        self.remote_demand = lock.new_condition()
        """Apart: a thread that only takes blocks with a reader sleeps through a call for another node's prefetch."""
        self.clock = lock.new_condition()
        """On which the thread sleeps that keeps the deadlines."""

    def wake_for_demand_locked(self) -> None:
        """A waiter waits for a block of either kind."""
        self.wake_for_kind_locked(remote=False)
        self.wake_for_kind_locked(remote=True)

    def wake_for_kind_locked(self, remote: bool) -> None:
        """A waiter waits for a block of this kind."""
        for condition in (self.remote, self.remote_demand) if remote else (self.general, self.demand):
            condition.notify()

    def wake_for_prefetch_locked(self) -> None:
        """There is a lot to fetch without a waiter."""
        self.general.notify_all()
        self.remote.notify_all()

    def wake_one_locked(self, *, remote_too: bool = False) -> None:
        """There is one thing to do that has no waiter; with `remote_too` also one from other nodes."""
        self.general.notify()
        if remote_too:
            self.remote.notify()

    def wake_clock_locked(self) -> None:
        """There is a time to keep that is earlier than those before it."""
        self.clock.notify()

    def wake_all_locked(self) -> None:
        """The end has come."""
        for condition in (self.general, self.demand, self.remote, self.remote_demand, self.clock):
            condition.notify_all()


def count_workers(origin_workers: int, peer_workers: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many threads there are for each kind of work, the origin's and other nodes': those that take everything, and
    those that only take blocks with a reader."""
    # One thread at least must be free of tasks, which may wait for bytes.
    reserved = max(1, origin_workers // 4)
    return (max(2, origin_workers) - reserved, reserved), (
        peer_workers - peer_workers // 4,
        peer_workers // 4,
    )


class WorkerPool:
    """The threads of one service, whose scheduling lock is `lock`. `stop_locked` ends them after what they are at."""

    def __init__(self, lock: OwnedLock, wakeups: Wakeups, next_work_locked: NextWork) -> None:
        self._lock = lock
        self._wakeups = wakeups
        self._next_work_locked = next_work_locked
        self._is_stopping = False
        self._threads: list[threading.Thread] = []

    def start_threads(self, origin_workers: int, peer_workers: int) -> None:
        """Start `origin_workers` threads, two at least, and `peer_workers` ones that wait for other nodes. A quarter of
        each only takes blocks with a reader, so that a reader that jumps does not queue behind the prefetch."""
        (general, reserved), (remote, remote_reserved) = count_workers(origin_workers, peer_workers)
        for number in range(general + reserved):
            wakeup = self._wakeups.demand if number < reserved else self._wakeups.general
            self._start_thread(f"fetch-{number}", wakeup, number < reserved, False)
        for number in range(remote + remote_reserved):
            is_reserved = number < remote_reserved
            wakeup = self._wakeups.remote_demand if is_reserved else self._wakeups.remote
            self._start_thread(f"peers-{number}", wakeup, is_reserved, True)

    def _start_thread(self, name: str, wakeup: threading.Condition, demand_only: bool, remote: bool) -> None:
        args = (wakeup, demand_only, remote)
        thread = threading.Thread(target=self._run_thread, args=args, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run_thread(self, wakeup: threading.Condition, demand_only: bool, remote: bool) -> None:
        while True:
            with self._lock:
                work = None
                while not self._is_stopping and (work := self._next_work_locked(demand_only, remote)) is None:
                    wakeup.wait()
                if work is None:
                    return
            try:
                work()
            except Exception:
                _log.exception("a task failed")

    def stop_locked(self) -> None:
        """Take nothing more."""
        self._lock.assert_held()
        self._is_stopping = True
        self._wakeups.wake_all_locked()

    def join_threads(self, deadline: float) -> None:
        """Wait for their end, at most until `deadline`, a time.monotonic()."""
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
