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
    from fusecache.loader.load import Job

_log = logging.getLogger(__name__)


class Employer(Protocol):
    """Where a crew's work comes from."""

    def take(self, demand_only: bool, remote: bool) -> Job | Callable[[], None] | None:
        """The next thing to do, under the lock; None: nothing now."""

    def do(self, job: Job | Callable[[], None]) -> None:
        """Do it, without the lock."""


class Crew:
    """`start` it, wake whom there is work for, `dismiss` and `join` it. `lock` is the loader's."""

    def __init__(self, lock: threading.Lock, employer: Employer) -> None:
        self.any = threading.Condition(lock)
        self.demand = threading.Condition(lock)
        self.remote = threading.Condition(lock)
        self.remote_demand = threading.Condition(lock)
        """Apart: who only takes demand sleeps through a call for what another node's prefetch waits for."""
        self._lock = lock
        self._employer = employer
        self._stopping = False
        self._threads: list[threading.Thread] = []

    def start(self, concurrency: int, remote: int) -> None:
        """Start `concurrency` threads, and `remote` ones that wait for other nodes. A quarter of each takes demand
        only, so that a reader who jumps does not queue behind the prefetch."""
        # One thread at least must be free of tasks, which may wait for bytes.
        reserved = max(1, concurrency // 4)
        for number in range(max(2, concurrency)):
            wake = self.demand if number < reserved else self.any
            self._thread(f"loader-{number}", wake, number < reserved, False)
        for number in range(remote):
            wake = self.remote_demand if number < remote // 4 else self.remote
            self._thread(f"peers-{number}", wake, number < remote // 4, True)

    def _thread(self, name: str, wake: threading.Condition, demand_only: bool, remote: bool) -> None:
        args = (wake, demand_only, remote)
        thread = threading.Thread(target=self._work, args=args, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self, wake: threading.Condition, demand_only: bool, remote: bool) -> None:
        while True:
            with self._lock:
                job = None
                while not self._stopping and (job := self._employer.take(demand_only, remote)) is None:
                    wake.wait()
                if job is None:
                    return
            try:
                self._employer.do(job)
            except Exception:
                _log.exception("a task failed")

    def call(self) -> None:
        """Under the lock: somebody waits for something."""
        self.more(remote=False)
        self.more(remote=True)

    def more(self, remote: bool) -> None:
        """Under the lock: somebody waits for more of this kind."""
        for condition in (self.remote, self.remote_demand) if remote else (self.any, self.demand):
            condition.notify()

    def call_all(self) -> None:
        """Under the lock: there is a lot to fetch that nobody waits for."""
        self.any.notify_all()
        self.remote.notify_all()

    def dismiss(self) -> None:
        """Under the lock: take nothing more."""
        self._stopping = True
        for condition in (self.any, self.demand, self.remote, self.remote_demand):
            condition.notify_all()

    def join(self, deadline: float) -> None:
        """Wait for their end, at most until `deadline`, a time.monotonic()."""
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
