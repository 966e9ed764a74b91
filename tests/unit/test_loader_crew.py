"""Each call reaches somebody who may do what it is about."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import pytest

from fusecache.loader.crew import Crew
from fusecache.loader.load import Job

HANG = 10.0


class Work:
    """Tasks of one kind; `demand`: somebody waits for them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.tasks: deque[Callable[[], None]] = deque()
        self.demand: deque[Callable[[], None]] = deque()

    def take(self, demand_only: bool, remote: bool) -> Job | Callable[[], None] | None:
        if not remote:
            return None
        if self.demand:
            return self.demand.popleft()
        return self.tasks.popleft() if self.tasks and not demand_only else None

    def do(self, job: Job | Callable[[], None]) -> None:
        assert not isinstance(job, Job)
        job()


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def crew(work: Work) -> Iterator[Crew]:
    crew = Crew(work.lock, work)
    crew.start(4, 4)  # of the latter, one takes demand only
    yield crew
    with work.lock:
        crew.dismiss()
    crew.join(time.monotonic() + HANG)


def test_no_call_is_lost_on_who_only_takes_demand(crew: Crew, work: Work) -> None:
    for _ in range(20):
        done = threading.Event()
        with work.lock:
            work.tasks.append(done.set)
            crew.call()
        assert done.wait(HANG)


def test_demand_is_met_while_all_others_are_busy(crew: Crew, work: Work) -> None:
    go, met = threading.Event(), threading.Event()
    busy = threading.Barrier(4)

    def hold() -> None:
        busy.wait(HANG)
        go.wait(HANG)

    try:
        with work.lock:
            work.tasks.extend([hold] * 3)
            crew.call_all()
        busy.wait(HANG)
        with work.lock:
            work.demand.append(met.set)
            crew.more(remote=True)
        assert met.wait(HANG)
    finally:
        go.set()
