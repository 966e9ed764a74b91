"""Tasks for the worker threads, and work that waits for its time. Guarded by the scheduling lock; does no I/O."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable

from fusecache.fetch.object_fetch import ObjectFetch


class TimedWork:
    """All methods are called with the scheduling lock.

    | State | Event | Next state |
    |---|---|---|
    | a timed task | its time has come (`pop_due_rechecks`) | one of `tasks` |
    | a recheck: blocks in flight that did not arrive | its time has come | handed to the caller |
    """

    def __init__(self) -> None:
        self.tasks: deque[Callable[[], None]] = deque()
        """To be done by the next free thread."""
        self._timed_tasks: list[tuple[float, int, Callable[[], None]]] = []
        self._rechecks: list[tuple[float, int, ObjectFetch, range]] = []
        self._sequence = itertools.count()

    @property
    def next_due_at(self) -> float | None:
        """The time.monotonic() at which the first of them is due; None: nothing waits for its time."""
        return min(
            [entries[0][0] for entries in (self._rechecks, self._timed_tasks) if entries], default=None
        )

    def schedule_task(self, due: float, task: Callable[[], None]) -> None:
        """Have this done by a thread at `due`, a time.monotonic()."""
        heapq.heappush(self._timed_tasks, (due, next(self._sequence), task))

    def schedule_recheck(self, due: float, object_fetch: ObjectFetch, blocks: range) -> None:
        """Look at `due` whether these blocks, in flight and not arrived, are there; without blocks: look then for
        something to fetch."""
        heapq.heappush(self._rechecks, (due, next(self._sequence), object_fetch, blocks))

    def has_recheck(self, object_fetch: ObjectFetch, block: int) -> bool:
        """Whether this block waits for its recheck."""
        return any(other is object_fetch and block in blocks for _, _, other, blocks in self._rechecks)

    def pop_due_rechecks(self, now: float) -> list[tuple[ObjectFetch, range]]:
        """The rechecks that are due; timed tasks that are due become tasks."""
        while self._timed_tasks and self._timed_tasks[0][0] <= now:
            self.tasks.append(heapq.heappop(self._timed_tasks)[2])
        found = []
        while self._rechecks and self._rechecks[0][0] <= now:
            _, _, object_fetch, blocks = heapq.heappop(self._rechecks)
            found.append((object_fetch, blocks))
        return found
