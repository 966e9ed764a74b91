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

from fusecache.fetch.object_fetch import FlightPlan, ObjectFetch
from fusecache.fetch.ordered_runs import OrderedRuns
from fusecache.types import ObjectVersion

_MIN_REMOTE_FILES = 3
"""Files under way, up to which the crew that fetches from other nodes goes on with the next: a node whose own share of
a file comes late would otherwise be late for the others' shares of the next one, too."""
_MAX_REMOTE_FILES = 16
"""The same, when all that is left of them is to come from few nodes that have enough to do: one slow node of a hundred
has a stripe of nearly every file, and all the others stood still."""
QUIET_SECONDS = 10.0
"""Seconds without a reader who asks, after which what no recording names is fetched, too."""
_MAX_BACKFILL_FLIGHTS = 2
"""Flights at a time of such a file."""

_MIN_FLIGHT_BYTES = 2 << 20
"""All files together are fetched by as many requests at once as there are threads, as far as each has so many bytes:
one connection to S3 brings 50 to 90 MB/s, after 20 to 50 ms. At 70 MB/s and 30 ms an adapter of 1 to 25 MB was loaded
by 16 threads in 65 ms (p99: 100) and not in 104 (p99: 280)."""

_DemandQueues = tuple[deque[tuple[ObjectFetch, int]], deque[tuple[ObjectFetch, int]]]


class FetchScheduler:
    """The work of one loader. `limit` is in blocks per flight; `begin` starts a file of the plan; `crew` threads fetch
    from the origin; `abreast` flights from other nodes at a time are for what nobody waits for."""

    def __init__(
        self,
        max_flight_blocks: int,
        start_file: Callable[[ObjectVersion, str], None],
        *,
        origin_workers: int = 16,
        max_prefetch_flights: Callable[[], int] = lambda: sys.maxsize,
    ) -> None:
        self.is_prefetch_paused = False
        """Only what somebody waits for is handed out."""
        self.whole_files: deque[ObjectFetch] = deque()
        """Loads whose whole file is wanted; those that are being read take turns, the others keep their order."""
        self.planned_files: deque[tuple[ObjectVersion, str]] = deque()
        """Versions, and their sources, that are wanted when nothing else is."""
        self.tasks: deque[Callable[[], None]] = deque()
        self.ordered_runs: deque[OrderedRuns] = deque()
        """Recordings that are followed now."""
        self.backfill_files: deque[ObjectFetch] = deque()
        """Loads that nobody reads, and whose rest is wanted when all is quiet."""
        self.last_request_at = 0.0
        """When a reader asked last, as a time.monotonic()."""
        self._max_flight_blocks = max_flight_blocks
        self._origin_workers = origin_workers
        self._max_prefetch_flights = max_prefetch_flights
        self._start_file = start_file
        self._reader_demand: _DemandQueues = (deque(), deque())
        """What readers wait for: from the origin or the disk, and from other nodes."""
        self._peer_demand: _DemandQueues = (deque(), deque())
        """The same for the prefetch of other nodes."""
        self._header_demand: _DemandQueues = (deque(), deque())
        """The same for headers, which nobody waits for."""
        self._runs_go_first = False
        self._timed_tasks: list[tuple[float, int, Callable[[], None]]] = []
        self._prefetches_by_owner: Counter[str] = Counter()
        """Flights ahead that are under way from other nodes, by the lane of their route."""
        self._prefetch_count = 0
        """All of those together."""
        self._rechecks: list[tuple[float, int, ObjectFetch, range]] = []
        self._sequence = itertools.count()

    def has_demand(self, remote: bool) -> bool:
        """Whether somebody may be waiting for work of this kind that nobody took yet."""
        return bool(self._reader_demand[remote] or self._peer_demand[remote])

    @property
    def next_due_at(self) -> float | None:
        """When something that was put off is due."""
        return min(
            [entries[0][0] for entries in (self._rechecks, self._timed_tasks) if entries], default=None
        )

    def next_work(
        self, demand_only: bool, now: float, remote: bool = False
    ) -> FlightPlan | Callable[[], None] | None:
        """The next thing to do: what comes from other nodes, or all the rest. They never do each other's work: all
        threads of all nodes could wait for one another."""
        job = self._demand_flight(self._reader_demand, remote)
        if job is not None or demand_only:
            return job
        if self.tasks and not remote:
            return self.tasks.popleft()
        job = self._demand_flight(self._peer_demand, remote)
        if job is not None or self.is_prefetch_paused:
            return job
        job = self._demand_flight(self._header_demand, remote) or self._flight_in_turn(now, remote)
        if job is not None:
            return job
        for being_read in (True, False):
            for object_fetch in self.whole_files:
                if object_fetch.has_reader is not being_read or object_fetch.backoff_until > now:
                    continue
                if not being_read and (job := self._prefetch_flight(object_fetch, now, remote)) is not None:
                    return job
                if not remote and object_fetch.origin_must_wait:
                    return None
        if self.planned_files and (
            not remote or len(self.whole_files) < _MIN_REMOTE_FILES or self._has_spare_owners()
        ):
            version, source = self.planned_files.popleft()
            return lambda: self._start_file(version, source)
        if now - self.last_request_at >= QUIET_SECONDS:
            for object_fetch in self.backfill_files:
                if (
                    object_fetch.flight_count < _MAX_BACKFILL_FLIGHTS
                    and (job := self._prefetch_flight(object_fetch, now, remote)) is not None
                ):
                    return job
        return None

    def _prefetch_flight(self, object_fetch: ObjectFetch, now: float, remote: bool) -> FlightPlan | None:
        if object_fetch.backoff_until > now or (
            remote and self._prefetch_count >= self._max_prefetch_flights()
        ):
            return None
        job = object_fetch.plan_prefetch_flight(
            self._flight_limit(object_fetch), remote, self._prefetches_by_owner
        )
        if job is not None and job.owner is not None:
            self._prefetches_by_owner[job.owner] += 1
            self._prefetch_count += 1
        return job

    def _has_spare_owners(self) -> bool:
        """Whether there are nodes with room in their window, of which the files under way want nothing more."""
        route = self.whole_files[-1].route
        if route is None:
            return False
        full = sum(flights >= route.prefetch_window for flights in self._prefetches_by_owner.values())
        return full < route.owner_count and len(self.whole_files) < _MAX_REMOTE_FILES

    def _flight_in_turn(self, now: float, remote: bool) -> FlightPlan | None:
        """Ahead of readers, or along a recording: each has its turn, since either may be wrong."""
        self._runs_go_first = not self._runs_go_first
        job = self._ordered_flight(now, remote) if self._runs_go_first else None
        if job is not None:
            return job
        for object_fetch in list(self.whole_files):
            if (
                object_fetch.has_reader
                and (job := self._prefetch_flight(object_fetch, now, remote)) is not None
            ):
                self.whole_files.remove(object_fetch)
                self.whole_files.append(object_fetch)
                return job
        return None if self._runs_go_first else self._ordered_flight(now, remote)

    def _ordered_flight(self, now: float, remote: bool) -> FlightPlan | None:
        for replay in self.ordered_runs:
            job = replay.next_flight(self._max_flight_blocks, remote, now)
            if job is not None:
                return job
        return None

    def _demand_flight(self, demand: _DemandQueues, remote: bool) -> FlightPlan | None:
        queue = demand[remote]
        while queue:
            object_fetch, block = queue.popleft()
            if object_fetch.idle[block] and block in object_fetch.waiters_by_block:
                if object_fetch.is_remote(block) is remote:
                    limit = self._flight_limit(object_fetch)
                    if demand is self._header_demand:
                        # no more of it: the headers of the other files come before the tensors of this one
                        limit = next(
                            n
                            for n in range(1, limit + 1)
                            if n == limit or block + n not in object_fetch.waiters_by_block
                        )
                    return object_fetch.plan_flight(block, limit, urgent=demand is self._reader_demand)
                demand[not remote].append((object_fetch, block))
        return None

    def _flight_limit(self, object_fetch: ObjectFetch) -> int:
        """Blocks of its next flight at most: all of the crew for a small file, if it is the only one."""
        if object_fetch.route is not None:
            return self._max_flight_blocks
        at_once = max(1, self._origin_workers // max(1, len(self.whole_files)))
        least = max(1, _MIN_FLIGHT_BYTES // object_fetch.stored.block_size)
        return min(self._max_flight_blocks, max(least, -(-object_fetch.stored.block_count // at_once)))

    def flight_ended(self, plan: FlightPlan) -> None:
        """This flight is over."""
        plan.object_fetch.flight_count -= 1
        if plan.owner is not None:
            self._prefetches_by_owner[plan.owner] -= 1
            self._prefetches_by_owner += Counter()  # without those that are 0 now
            self._prefetch_count -= 1

    def queue_demand(
        self, object_fetch: ObjectFetch, blocks: Iterable[int], *, is_header: bool = False
    ) -> bool:
        """Somebody waits for these blocks; returns whether there is something to do about it. `head`: they hold a
        header, and no reader waits."""
        called = False
        for block in blocks:
            if object_fetch.idle[block]:
                demand = (
                    self._header_demand
                    if is_header
                    else self._reader_demand
                    if object_fetch.has_urgent_waiter(block)
                    else self._peer_demand
                )
                demand[object_fetch.is_remote(block)].append((object_fetch, block))
                called = True
        return called

    def progress(self) -> dict[str, int]:
        """Figures for `fusecache status`."""
        return {
            "fetching": len(self.whole_files),
            "planned": len(self.planned_files),
            "replaying": len(self.ordered_runs),
            "bytes_to_fetch": sum(
                object_fetch.idle.count(1) * object_fetch.stored.block_size
                for object_fetch in self.whole_files
            ),
        }

    def add_whole_file(self, object_fetch: ObjectFetch) -> bool:
        """All of this file is wanted; returns whether that is new. Not while a recording says what is."""
        if (
            self.is_prefetch_paused
            or object_fetch in self.whole_files
            or object_fetch.stored.is_complete
            or object_fetch.gone_error is not None
        ):
            return False
        if object_fetch.prefetch_mask is not None:
            return False
        self.whole_files.append(object_fetch)
        return True

    def bytes_until_complete(self, object_fetch: ObjectFetch) -> int:
        """Bytes that will be fetched before the last of this active load's, its own included."""
        total = 0
        for replay in self.ordered_runs:
            total += replay.bytes_until_complete(object_fetch)
            if object_fetch in replay.fetches:
                return total
        for other in self.whole_files:
            total += other.stored.missing_block_count * other.stored.block_size
            if other is object_fetch:
                break
        return total

    def drop_file(self, object_fetch: ObjectFetch) -> None:
        """From now on only what somebody waits for is wanted of this file."""
        for loads in (self.whole_files, self.backfill_files):
            with contextlib.suppress(ValueError):
                loads.remove(object_fetch)

    def has_file(self, object_fetch: ObjectFetch) -> bool:
        """Whether it is among those whose file is wanted."""
        return object_fetch in self.whole_files or object_fetch in self.backfill_files

    def rewind_runs(self, object_fetch: ObjectFetch) -> None:
        """Blocks of this load were handed out, and did not come."""
        for replay in self.ordered_runs:
            if object_fetch in replay.fetches:
                replay.rewind()

    def schedule_task(self, due: float, task: Callable[[], None]) -> None:
        """Have this done by the crew at `due`."""
        heapq.heappush(self._timed_tasks, (due, next(self._sequence), task))

    def drop_unopened(self, is_unwanted: Callable[[ObjectVersion], bool]) -> list[ObjectFetch]:
        """Fetch no more of these files, but for those that somebody has open; returns the loads that were retired."""
        self.planned_files = deque(item for item in self.planned_files if not is_unwanted(item[0]))
        dropped = [
            object_fetch
            for object_fetch in self.whole_files
            if not object_fetch.open_count and is_unwanted(object_fetch.version)
        ]
        self.whole_files = deque(
            object_fetch for object_fetch in self.whole_files if object_fetch not in dropped
        )
        return dropped

    def schedule_recheck(self, due: float, object_fetch: ObjectFetch, blocks: range) -> None:
        """These blocks, taken and not landed, are to be looked at again at `due`."""
        heapq.heappush(self._rechecks, (due, next(self._sequence), object_fetch, blocks))

    def has_recheck(self, object_fetch: ObjectFetch, block: int) -> bool:
        """Whether this block waits for its time."""
        return any(other is object_fetch and block in blocks for _, _, other, blocks in self._rechecks)

    def pop_due_rechecks(self, now: float) -> list[tuple[ObjectFetch, range]]:
        """What was put off until now; reminders become tasks."""
        while self._timed_tasks and self._timed_tasks[0][0] <= now:
            self.tasks.append(heapq.heappop(self._timed_tasks)[2])
        found = []
        while self._rechecks and self._rechecks[0][0] <= now:
            _, _, object_fetch, blocks = heapq.heappop(self._rechecks)
            found.append((object_fetch, blocks))
        return found

    def pause_prefetch(self) -> None:
        """Drop all that nobody waits for."""
        self.is_prefetch_paused = True
        self.planned_files.clear()
        self.tasks.clear()
        self.whole_files.clear()
        self.backfill_files.clear()
        self.ordered_runs.clear()
