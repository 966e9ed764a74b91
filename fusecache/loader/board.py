"""What is to be fetched, and in which order. Guarded by the loader's lock; does no I/O.

Order: a block a reader waits for, with the idle blocks behind it; tasks; the same for a block that another node's
prefetch waits for; the next run ahead of a reader, of each
file that is being read in turn; the other files, one after the other, so that the first of them is whole soon and
can be read while the next one comes; a file of the prefetch plan.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable

from fusecache.loader.load import Job, ObjectLoad
from fusecache.types import ObjectVersion

_AT_ONCE = 3
"""Files under way, up to which the crew that fetches from other nodes goes on with the next: a node whose own share of
a file comes late would otherwise be late for the others' shares of the next one, too."""


_Demand = tuple[deque[tuple[ObjectLoad, int]], deque[tuple[ObjectLoad, int]]]


class Board:
    """The work of one loader. `limit` is in blocks per flight; `begin` starts a file of the plan."""

    def __init__(self, limit: int, begin: Callable[[ObjectVersion, str], None]) -> None:
        self.paused = False
        """Only what somebody waits for is handed out."""
        self.active: deque[ObjectLoad] = deque()
        """Loads whose whole file is wanted; those that are being read take turns, the others keep their order."""
        self.ahead: deque[tuple[ObjectVersion, str]] = deque()
        """Versions, and their sources, that are wanted when nothing else is."""
        self.tasks: deque[Callable[[], None]] = deque()
        self._limit = limit
        self._begin = begin
        self._urgent: _Demand = (deque(), deque())
        """What readers wait for: from the origin or the disk, and from other nodes."""
        self._patient: _Demand = (deque(), deque())
        """The same for the prefetch of other nodes."""
        self._lanes: Counter[str] = Counter()
        """Flights ahead that are under way from other nodes, by the lane of their route."""
        self._later: list[tuple[float, int, ObjectLoad, range]] = []
        self._order = itertools.count()

    def urgent(self, remote: bool) -> bool:
        """Whether somebody may be waiting for work of this kind that nobody took yet."""
        return bool(self._urgent[remote] or self._patient[remote])

    @property
    def next_due(self) -> float | None:
        """When something that was put off is due."""
        return self._later[0][0] if self._later else None

    def take(self, demand_only: bool, now: float, remote: bool = False) -> Job | Callable[[], None] | None:
        """The next thing to do: what comes from other nodes, or all the rest. They never do each other's work: all
        threads of all nodes could wait for one another."""
        job = self._demanded(self._urgent, remote)
        if job is not None or demand_only:
            return job
        if self.tasks and not remote:
            return self.tasks.popleft()
        job = self._demanded(self._patient, remote)
        if job is not None or self.paused:
            return job
        for being_read in (True, False):
            for load in list(self.active):
                if load.being_read is not being_read or load.resting_until > now:
                    continue
                job = load.take_ahead(self._limit, remote, self._lanes)
                if job is not None:
                    if job.lane is not None:
                        self._lanes[job.lane] += 1
                    if being_read:
                        self.active.remove(load)
                        self.active.append(load)
                    return job
        if self.ahead and (not remote or len(self.active) < _AT_ONCE):
            version, source = self.ahead.popleft()
            return lambda: self._begin(version, source)
        return None

    def _demanded(self, demand: _Demand, remote: bool) -> Job | None:
        queue = demand[remote]
        while queue:
            load, block = queue.popleft()
            if load.idle[block] and block in load.waiting:
                if load.is_remote(block) is remote:
                    return load.take(block, self._limit, urgent=demand is self._urgent)
                demand[not remote].append((load, block))
        return None

    def ended(self, job: Job) -> None:
        """This flight is over."""
        job.load.jobs -= 1
        if job.lane is not None:
            self._lanes[job.lane] -= 1

    def call_for(self, load: ObjectLoad, blocks: Iterable[int]) -> bool:
        """Somebody waits for these blocks; returns whether there is something to do about it."""
        called = False
        for block in blocks:
            if load.idle[block]:
                demand = self._urgent if load.is_urgent(block) else self._patient
                demand[load.is_remote(block)].append((load, block))
                called = True
        return called

    def progress(self) -> dict[str, int]:
        """Figures for `fusecache status`."""
        return {
            "fetching": len(self.active),
            "planned": len(self.ahead),
            "bytes_to_fetch": sum(load.idle.count(1) * load.stored.block_size for load in self.active),
        }

    def activate(self, load: ObjectLoad) -> bool:
        """All of this file is wanted; returns whether that is new."""
        if self.paused or load in self.active or load.stored.complete or load.gone is not None:
            return False
        self.active.append(load)
        return True

    def before(self, load: ObjectLoad) -> int:
        """Bytes that will be fetched before the last of this active load's, its own included."""
        total = 0
        for other in self.active:
            total += other.stored.missing * other.stored.block_size
            if other is load:
                break
        return total

    def retire(self, load: ObjectLoad) -> None:
        """From now on only what somebody waits for is wanted of this file."""
        with contextlib.suppress(ValueError):
            self.active.remove(load)

    def drop(self, unwanted: Callable[[ObjectVersion], bool]) -> list[ObjectLoad]:
        """Fetch no more of these files, but for those that somebody has open; returns the loads that were retired."""
        self.ahead = deque(item for item in self.ahead if not unwanted(item[0]))
        dropped = [load for load in self.active if not load.opens and unwanted(load.version)]
        self.active = deque(load for load in self.active if load not in dropped)
        return dropped

    def put_off(self, due: float, load: ObjectLoad, blocks: range) -> None:
        """These blocks, taken and not landed, are to be looked at again at `due`."""
        heapq.heappush(self._later, (due, next(self._order), load, blocks))

    def is_put_off(self, load: ObjectLoad, block: int) -> bool:
        """Whether this block waits for its time."""
        return any(other is load and block in blocks for _, _, other, blocks in self._later)

    def due(self, now: float) -> list[tuple[ObjectLoad, range]]:
        """What was put off until now."""
        found = []
        while self._later and self._later[0][0] <= now:
            _, _, load, blocks = heapq.heappop(self._later)
            found.append((load, blocks))
        return found

    def pause(self) -> None:
        """Drop all that nobody waits for."""
        self.paused = True
        self.ahead.clear()
        self.tasks.clear()
        self.active.clear()
