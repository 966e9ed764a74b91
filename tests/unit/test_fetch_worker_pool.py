"""Each call reaches somebody who may do what it is about."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import pytest

from fusecache.fetch.worker_pool import Wakeups, WorkerPool
from fusecache.locking import OwnedLock

HANG = 10.0


class Work:
    """Tasks of one kind; `demand`: somebody waits for them."""

    def __init__(self) -> None:
        self.lock = OwnedLock()
        self.wakeups = Wakeups(self.lock)
        self.tasks: deque[Callable[[], None]] = deque()
        self.demand: deque[Callable[[], None]] = deque()

    def next_work_locked(self, demand_only: bool, remote: bool) -> Callable[[], None] | None:
        if not remote:
            return None
        if self.demand:
            return self.demand.popleft()
        return self.tasks.popleft() if self.tasks and not demand_only else None


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def crew(work: Work) -> Iterator[WorkerPool]:
    crew = WorkerPool(work.lock, work.wakeups, work.next_work_locked)
    crew.start_threads(4, 4)  # of the latter, one takes demand only
    yield crew
    with work.lock:
        crew.stop_locked()
    crew.join_threads(time.monotonic() + HANG)


@pytest.mark.usefixtures("crew")
def test_no_call_is_lost_on_who_only_takes_demand(work: Work) -> None:
    for _ in range(20):
        done = threading.Event()
        with work.lock:
            work.tasks.append(done.set)
            work.wakeups.wake_for_demand_locked()
        assert done.wait(HANG)


@pytest.mark.usefixtures("crew")
def test_demand_is_met_while_all_others_are_busy(work: Work) -> None:
    go, met = threading.Event(), threading.Event()
    busy = threading.Barrier(4)

    def hold() -> None:
        busy.wait(HANG)
        go.wait(HANG)

    try:
        with work.lock:
            work.tasks.extend([hold] * 3)
            work.wakeups.wake_for_prefetch_locked()
        busy.wait(HANG)
        with work.lock:
            work.demand.append(met.set)
            work.wakeups.wake_for_kind_locked(remote=True)
        assert met.wait(HANG)
    finally:
        go.set()
