"""What is to be fetched, and in which order. Guarded by the loader's lock; does no I/O.

Order: a block a reader waits for, with the idle blocks behind it; tasks; the same for a block that another node's
prefetch waits for; headers; in turn, the next run ahead of each reader and the next one of a recording; the other
files, one after the other, so that the first of them is whole soon and can be read while the next one comes; a file of
the prefetch plan; when nobody has asked for anything for a while, what recordings left out.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable

from fusecache.loader.load import Job, ObjectLoad
from fusecache.loader.replay import Replay
from fusecache.types import ObjectVersion

_AT_ONCE = 3
"""Files under way, up to which the crew that fetches from other nodes goes on with the next: a node whose own share of
a file comes late would otherwise be late for the others' shares of the next one, too."""
_AT_MOST = 16
"""The same, when all that is left of them is to come from few nodes that have enough to do: one slow node of a hundred
has a stripe of nearly every file, and all the others stood still."""
QUIET = 10.0
"""Seconds without a reader who asks, after which what no recording names is fetched, too."""
_SLOWLY = 2
"""Flights at a time of such a file."""

_LEAST = 2 << 20
"""All files together are fetched by as many requests at once as there are threads, as far as each has so many bytes:
one connection to S3 brings 50 to 90 MB/s, after 20 to 50 ms. At 70 MB/s and 30 ms an adapter of 1 to 25 MB was loaded
by 16 threads in 65 ms (p99: 100) and not in 104 (p99: 280)."""

_Demand = tuple[deque[tuple[ObjectLoad, int]], deque[tuple[ObjectLoad, int]]]


class Board:
    """The work of one loader. `limit` is in blocks per flight; `begin` starts a file of the plan; `crew` threads fetch
    from the origin; `abreast` flights from other nodes at a time are for what nobody waits for."""

    def __init__(
        self,
        limit: int,
        begin: Callable[[ObjectVersion, str], None],
        *,
        crew: int = 16,
        abreast: Callable[[], int] = lambda: sys.maxsize,
    ) -> None:
        self.paused = False
        """Only what somebody waits for is handed out."""
        self.active: deque[ObjectLoad] = deque()
        """Loads whose whole file is wanted; those that are being read take turns, the others keep their order."""
        self.ahead: deque[tuple[ObjectVersion, str]] = deque()
        """Versions, and their sources, that are wanted when nothing else is."""
        self.tasks: deque[Callable[[], None]] = deque()
        self.replays: deque[Replay] = deque()
        """Recordings that are followed now."""
        self.slow: deque[ObjectLoad] = deque()
        """Loads that nobody reads, and whose rest is wanted when all is quiet."""
        self.asked = 0.0
        """When a reader asked last, as a time.monotonic()."""
        self._limit = limit
        self._crew = crew
        self._abreast = abreast
        self._begin = begin
        self._urgent: _Demand = (deque(), deque())
        """What readers wait for: from the origin or the disk, and from other nodes."""
        self._patient: _Demand = (deque(), deque())
        """The same for the prefetch of other nodes."""
        self._heads: _Demand = (deque(), deque())
        """The same for headers, which nobody waits for."""
        self._replay_next = False
        self._reminders: list[tuple[float, int, Callable[[], None]]] = []
        self._lanes: Counter[str] = Counter()
        """Flights ahead that are under way from other nodes, by the lane of their route."""
        self._flying = 0
        """All of those together."""
        self._later: list[tuple[float, int, ObjectLoad, range]] = []
        self._order = itertools.count()

    def urgent(self, remote: bool) -> bool:
        """Whether somebody may be waiting for work of this kind that nobody took yet."""
        return bool(self._urgent[remote] or self._patient[remote])

    @property
    def next_due(self) -> float | None:
        """When something that was put off is due."""
        return min([entries[0][0] for entries in (self._later, self._reminders) if entries], default=None)

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
        job = self._demanded(self._heads, remote) or self._in_turn(now, remote)
        if job is not None:
            return job
        for being_read in (True, False):
            for load in self.active:
                if load.being_read is not being_read or load.resting_until > now:
                    continue
                if not being_read and (job := self._ahead_of(load, now, remote)) is not None:
                    return job
                if not remote and load.in_turn:
                    return None
        if self.ahead and (not remote or len(self.active) < _AT_ONCE or self._has_room()):
            version, source = self.ahead.popleft()
            return lambda: self._begin(version, source)
        if now - self.asked >= QUIET:
            for load in self.slow:
                if load.jobs < _SLOWLY and (job := self._ahead_of(load, now, remote)) is not None:
                    return job
        return None

    def _ahead_of(self, load: ObjectLoad, now: float, remote: bool) -> Job | None:
        if load.resting_until > now or (remote and self._flying >= self._abreast()):
            return None
        job = load.take_ahead(self._limit_of(load), remote, self._lanes)
        if job is not None and job.lane is not None:
            self._lanes[job.lane] += 1
            self._flying += 1
        return job

    def _has_room(self) -> bool:
        """Whether there are nodes with room in their window, of which the files under way want nothing more."""
        route = self.active[-1].route
        if route is None:
            return False
        full = sum(flights >= route.window for flights in self._lanes.values())
        return full < route.owners and len(self.active) < _AT_MOST

    def _in_turn(self, now: float, remote: bool) -> Job | None:
        """Ahead of readers, or along a recording: each has its turn, since either may be wrong."""
        self._replay_next = not self._replay_next
        job = self._along_recordings(now, remote) if self._replay_next else None
        if job is not None:
            return job
        for load in list(self.active):
            if load.being_read and (job := self._ahead_of(load, now, remote)) is not None:
                self.active.remove(load)
                self.active.append(load)
                return job
        return None if self._replay_next else self._along_recordings(now, remote)

    def _along_recordings(self, now: float, remote: bool) -> Job | None:
        for replay in self.replays:
            job = replay.take(self._limit, remote, now)
            if job is not None:
                return job
        return None

    def _demanded(self, demand: _Demand, remote: bool) -> Job | None:
        queue = demand[remote]
        while queue:
            load, block = queue.popleft()
            if load.idle[block] and block in load.waiting:
                if load.is_remote(block) is remote:
                    limit = self._limit_of(load)
                    if demand is self._heads:
                        # no more of it: the headers of the other files come before the tensors of this one
                        limit = next(
                            n for n in range(1, limit + 1) if n == limit or block + n not in load.waiting
                        )
                    return load.take(block, limit, urgent=demand is self._urgent)
                demand[not remote].append((load, block))
        return None

    def _limit_of(self, load: ObjectLoad) -> int:
        """Blocks of its next flight at most: all of the crew for a small file, if it is the only one."""
        if load.route is not None:
            return self._limit
        at_once = max(1, self._crew // max(1, len(self.active)))
        least = max(1, _LEAST // load.stored.block_size)
        return min(self._limit, max(least, -(-load.stored.block_count // at_once)))

    def ended(self, job: Job) -> None:
        """This flight is over."""
        job.load.jobs -= 1
        if job.lane is not None:
            self._lanes[job.lane] -= 1
            self._lanes += Counter()  # without those that are 0 now
            self._flying -= 1

    def call_for(self, load: ObjectLoad, blocks: Iterable[int], *, head: bool = False) -> bool:
        """Somebody waits for these blocks; returns whether there is something to do about it. `head`: they hold a
        header, and no reader waits."""
        called = False
        for block in blocks:
            if load.idle[block]:
                demand = self._heads if head else self._urgent if load.is_urgent(block) else self._patient
                demand[load.is_remote(block)].append((load, block))
                called = True
        return called

    def progress(self) -> dict[str, int]:
        """Figures for `fusecache status`."""
        return {
            "fetching": len(self.active),
            "planned": len(self.ahead),
            "replaying": len(self.replays),
            "bytes_to_fetch": sum(load.idle.count(1) * load.stored.block_size for load in self.active),
        }

    def activate(self, load: ObjectLoad) -> bool:
        """All of this file is wanted; returns whether that is new. Not while a recording says what is."""
        if self.paused or load in self.active or load.stored.complete or load.gone is not None:
            return False
        if load.wanted is not None:
            return False
        self.active.append(load)
        return True

    def before(self, load: ObjectLoad) -> int:
        """Bytes that will be fetched before the last of this active load's, its own included."""
        total = 0
        for replay in self.replays:
            total += replay.before(load)
            if load in replay.loads:
                return total
        for other in self.active:
            total += other.stored.missing * other.stored.block_size
            if other is load:
                break
        return total

    def retire(self, load: ObjectLoad) -> None:
        """From now on only what somebody waits for is wanted of this file."""
        for loads in (self.active, self.slow):
            with contextlib.suppress(ValueError):
                loads.remove(load)

    def holds(self, load: ObjectLoad) -> bool:
        """Whether it is among those whose file is wanted."""
        return load in self.active or load in self.slow

    def look_again(self, load: ObjectLoad) -> None:
        """Blocks of this load were handed out, and did not come."""
        for replay in self.replays:
            if load in replay.loads:
                replay.again()

    def remind(self, due: float, task: Callable[[], None]) -> None:
        """Have this done by the crew at `due`."""
        heapq.heappush(self._reminders, (due, next(self._order), task))

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
        """What was put off until now; reminders become tasks."""
        while self._reminders and self._reminders[0][0] <= now:
            self.tasks.append(heapq.heappop(self._reminders)[2])
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
        self.slow.clear()
        self.replays.clear()
