"""The threads of a loader, in groups: for other nodes or for all the rest, and of each a part for demand only.

The loader's lock guards what they take their work from; each group sleeps on a condition of its own over it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from fusecache.fetch.object_fetch import FlightPlan

_log = logging.getLogger(__name__)


class WorkSource(Protocol):
    """Where a crew's work comes from."""

    def next_work_locked(self, demand_only: bool, remote: bool) -> FlightPlan | Callable[[], None] | None:
        """The next thing to do, under the lock; None: nothing now."""

    def run_work(self, work: FlightPlan | Callable[[], None]) -> None:
        """Do it, without the lock."""


class WorkerPool:
    """`start` it, wake whom there is work for, `dismiss` and `join` it. `lock` is the loader's."""

    def __init__(self, lock: threading.Lock, work_source: WorkSource) -> None:
        self.general_wakeup = threading.Condition(lock)
        self.demand_wakeup = threading.Condition(lock)
        self.remote_wakeup = threading.Condition(lock)
        self.remote_demand_wakeup = threading.Condition(lock)
        """Apart: who only takes demand sleeps through a call for what another node's prefetch waits for."""
        self._lock = lock
        self._work_source = work_source
        self._is_stopping = False
        self._threads: list[threading.Thread] = []

    def start_threads(self, origin_workers: int, peer_workers: int) -> None:
        """Start `concurrency` threads, and `remote` ones that wait for other nodes. A quarter of each takes demand
        only, so that a reader who jumps does not queue behind the prefetch."""
        # One thread at least must be free of tasks, which may wait for bytes.
        reserved = max(1, origin_workers // 4)
        for number in range(max(2, origin_workers)):
            wake = self.demand_wakeup if number < reserved else self.general_wakeup
            self._start_thread(f"loader-{number}", wake, number < reserved, False)
        for number in range(peer_workers):
            wake = self.remote_demand_wakeup if number < peer_workers // 4 else self.remote_wakeup
            self._start_thread(f"peers-{number}", wake, number < peer_workers // 4, True)

    def _start_thread(self, name: str, wakeup: threading.Condition, demand_only: bool, remote: bool) -> None:
        args = (wakeup, demand_only, remote)
        thread = threading.Thread(target=self._run_thread, args=args, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run_thread(self, wakeup: threading.Condition, demand_only: bool, remote: bool) -> None:
        while True:
            with self._lock:
                job = None
                while (
                    not self._is_stopping
                    and (job := self._work_source.next_work_locked(demand_only, remote)) is None
                ):
                    wakeup.wait()
                if job is None:
                    return
            try:
                self._work_source.run_work(job)
            except Exception:
                _log.exception("a task failed")

    def wake_for_demand_locked(self) -> None:
        """Under the lock: somebody waits for something."""
        self.wake_for_kind_locked(remote=False)
        self.wake_for_kind_locked(remote=True)

    def wake_for_kind_locked(self, remote: bool) -> None:
        """Under the lock: somebody waits for more of this kind."""
        for condition in (
            (self.remote_wakeup, self.remote_demand_wakeup)
            if remote
            else (self.general_wakeup, self.demand_wakeup)
        ):
            condition.notify()

    def wake_for_prefetch_locked(self) -> None:
        """Under the lock: there is a lot to fetch that nobody waits for."""
        self.general_wakeup.notify_all()
        self.remote_wakeup.notify_all()

    def stop_locked(self) -> None:
        """Under the lock: take nothing more."""
        self._is_stopping = True
        for condition in (
            self.general_wakeup,
            self.demand_wakeup,
            self.remote_wakeup,
            self.remote_demand_wakeup,
        ):
            condition.notify_all()

    def join_threads(self, deadline: float) -> None:
        """Wait for their end, at most until `deadline`, a time.monotonic()."""
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
