"""Files and runs that are fetched without a waiter, in their order. Guarded by the scheduling lock; does no I/O."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fusecache.fetch.object_fetch import FlightPlan, ObjectFetch
from fusecache.fetch.ordered_runs import OrderedRuns
from fusecache.types import ObjectVersion

_MIN_REMOTE_FILES = 3
"""Files under way, up to which the threads that fetch from other nodes go on with the next: a node whose own share of
a file comes late would otherwise be late for the others' shares of the next one, too."""
_MAX_REMOTE_FILES = 16
"""The same, when all that is left of them is to come from few nodes that have enough to do: one slow node of a hundred
has a stripe of nearly every file, and all the others stood still."""
QUIET_SECONDS = 10.0
"""Seconds without a reader that asks, after which the blocks that a prefetch mask left out are fetched, too."""
_MAX_BACKFILL_FLIGHTS = 2
"""Flights at a time of such a file."""

_MIN_FLIGHT_BYTES = 2 << 20
"""All files together are fetched by as many requests at once as there are threads, as far as each has so many bytes:
one connection to S3 brings 50 to 90 MB/s, after 20 to 50 ms. At 70 MB/s and 30 ms an adapter of 1 to 25 MB was loaded
by 16 threads in 65 ms (p99: 100) and not in 104 (p99: 280)."""


@dataclass(frozen=True)
class PlannedFile:
    """A file whose turn has come: a thread opens it, and has all of it fetched."""

    version: ObjectVersion
    source: str


class PrefetchQueues:
    """Files and runs that are fetched without a waiter. `max_flight_blocks` is the most blocks of a flight,
    `origin_workers` the number of threads that fetch from the origin; at most `max_prefetch_flights()` flights from
    other nodes are under way without a waiter. All methods are called with the scheduling lock.

    | File | Event | Next state |
    |---|---|---|
    | unknown | `plan_files` | planned |
    | planned | its turn comes | handed to a thread, which calls `add_whole_file` |
    | planned | `drop_unopened`, `pause` | unknown |
    | unknown | `add_whole_file` | whole file wanted |
    | unknown | appended to `backfill_files` | rest wanted when all is quiet |
    | whole file or rest wanted | `drop_file`: it is complete, is gone, has no room, or gets a mask; `pause` | unknown |
    """

    def __init__(
        self,
        max_flight_blocks: int,
        *,
        origin_workers: int = 16,
        max_prefetch_flights: Callable[[], int] = lambda: sys.maxsize,
    ) -> None:
        self.is_paused = False
        """Only blocks with a waiter are handed out, from now on and for good."""
        self.whole_files: deque[ObjectFetch] = deque()
        """Fetches whose whole file is wanted; those that are being read take turns, the others keep their order."""
        self.planned_files: deque[PlannedFile] = deque()
        """Files that are begun when nothing else is to be done."""
        self.ordered_runs: deque[OrderedRuns] = deque()
        """Orders of blocks that are followed now."""
        self.backfill_files: deque[ObjectFetch] = deque()
        """Fetches without a reader, whose rest is wanted when all is quiet."""
        self.last_request_at = 0.0
        """When a reader asked for a missing block the last time, as a time.monotonic()."""
        self._max_flight_blocks = max_flight_blocks
        self._origin_workers = origin_workers
        self._max_prefetch_flights = max_prefetch_flights
        self._runs_go_first = False
        self._prefetches_by_owner: Counter[str] = Counter()
        """Flights without a waiter that are under way from other nodes, by the owner of their stripe."""
        self._prefetch_count = 0
        """All of those together."""

    # -- the next work

    def next_work(self, now: float, remote: bool) -> FlightPlan | PlannedFile | None:
        """The next thing to fetch without a waiter, from other nodes or from elsewhere: in turn, ahead of each reader
        and along each order; then the other files, one after the other; then a planned file; then what masks left out,
        when all is quiet."""
        if self.is_paused:
            return None
        plan = self._flight_in_turn(now, remote)
        if plan is not None:
            return plan
        for is_being_read in (True, False):
            for object_fetch in self.whole_files:
                if object_fetch.has_reader is not is_being_read or object_fetch.backoff.until > now:
                    continue
                if (
                    not is_being_read
                    and (plan := self._prefetch_flight(object_fetch, now, remote)) is not None
                ):
                    return plan
                if not remote and object_fetch.origin_must_wait:
                    return None
        if self.planned_files and (
            not remote or len(self.whole_files) < _MIN_REMOTE_FILES or self._has_spare_owners()
        ):
            return self.planned_files.popleft()
        if now - self.last_request_at >= QUIET_SECONDS:
            for object_fetch in self.backfill_files:
                if (
                    object_fetch.flight_count < _MAX_BACKFILL_FLIGHTS
                    and (plan := self._prefetch_flight(object_fetch, now, remote)) is not None
                ):
                    return plan
        return None

    def _flight_in_turn(self, now: float, remote: bool) -> FlightPlan | None:
        """Ahead of readers, or along an order: each has its turn, since either may be wrong."""
        self._runs_go_first = not self._runs_go_first
        plan = self._ordered_flight(now, remote) if self._runs_go_first else None
        if plan is not None:
            return plan
        for object_fetch in list(self.whole_files):
            if (
                object_fetch.has_reader
                and (plan := self._prefetch_flight(object_fetch, now, remote)) is not None
            ):
                self.whole_files.remove(object_fetch)
                self.whole_files.append(object_fetch)
                return plan
        return None if self._runs_go_first else self._ordered_flight(now, remote)

    def _ordered_flight(self, now: float, remote: bool) -> FlightPlan | None:
        for runs in self.ordered_runs:
            plan = runs.next_flight(self._max_flight_blocks, remote, now)
            if plan is not None:
                return plan
        return None

    def _prefetch_flight(self, object_fetch: ObjectFetch, now: float, remote: bool) -> FlightPlan | None:
        if object_fetch.backoff.until > now or (
            remote and self._prefetch_count >= self._max_prefetch_flights()
        ):
            return None
        plan = object_fetch.plan_prefetch_flight(
            self.flight_limit(object_fetch), remote, self._prefetches_by_owner
        )
        if plan is not None and plan.owner is not None:
            self._prefetches_by_owner[plan.owner] += 1
            self._prefetch_count += 1
        return plan

    def _has_spare_owners(self) -> bool:
        """Whether there are nodes with room in their window, of which the files under way want nothing more."""
        route = self.whole_files[-1].route
        if route is None:
            return False
        full = sum(flights >= route.prefetch_window for flights in self._prefetches_by_owner.values())
        return full < route.owner_count and len(self.whole_files) < _MAX_REMOTE_FILES

    def flight_limit(self, object_fetch: ObjectFetch) -> int:
        """Blocks of its next flight at most: a small file that is alone is fetched by all threads."""
        if object_fetch.route is not None:
            return self._max_flight_blocks
        at_once = max(1, self._origin_workers // max(1, len(self.whole_files)))
        least = max(1, _MIN_FLIGHT_BYTES // object_fetch.stored.block_size)
        return min(self._max_flight_blocks, max(least, -(-object_fetch.stored.block_count // at_once)))

    # -- what is wanted

    def plan_files(self, versions: Iterable[tuple[ObjectVersion, str]]) -> None:
        """Begin these versions (of these sources) in this order, but for those that are planned or wanted already."""
        known = {planned.version.id for planned in self.planned_files}
        known.update(object_fetch.version.id for object_fetch in self.whole_files)
        self.planned_files.extend(
            PlannedFile(version, source) for version, source in versions if version.id not in known
        )

    def add_whole_file(self, object_fetch: ObjectFetch) -> bool:
        """All of this file is wanted; returns whether that is new. Not while a prefetch mask says what is wanted."""
        if (
            self.is_paused
            or object_fetch in self.whole_files
            or object_fetch.stored.is_complete
            or object_fetch.gone_error is not None
            or object_fetch.prefetch_mask is not None
        ):
            return False
        self.whole_files.append(object_fetch)
        return True

    def drop_file(self, object_fetch: ObjectFetch) -> None:
        """From now on only blocks with a waiter are wanted of this file."""
        for fetches in (self.whole_files, self.backfill_files):
            with contextlib.suppress(ValueError):
                fetches.remove(object_fetch)

    def has_file(self, object_fetch: ObjectFetch) -> bool:
        """Whether all of it, or its rest, is wanted."""
        return object_fetch in self.whole_files or object_fetch in self.backfill_files

    def drop_unopened(self, is_unwanted: Callable[[ObjectVersion], bool]) -> list[ObjectFetch]:
        """Begin none of these files, and fetch no more of those that no program has open; returns the latter."""
        self.planned_files = deque(
            planned for planned in self.planned_files if not is_unwanted(planned.version)
        )
        dropped = [
            object_fetch
            for object_fetch in self.whole_files
            if not object_fetch.open_count and is_unwanted(object_fetch.version)
        ]
        self.whole_files = deque(
            object_fetch for object_fetch in self.whole_files if object_fetch not in dropped
        )
        return dropped

    def pause(self) -> None:
        """Forget everything, and hand out nothing from now on."""
        self.is_paused = True
        self.planned_files.clear()
        self.whole_files.clear()
        self.backfill_files.clear()
        self.ordered_runs.clear()

    # -- what flights did

    def reader_asked(self, now: float) -> None:
        """A reader asked for a missing block: it is not quiet for a while."""
        self.last_request_at = now

    def flight_ended(self, plan: FlightPlan) -> None:
        """This flight is over: there is room in the window of its owner."""
        if plan.owner is not None:
            self._prefetches_by_owner[plan.owner] -= 1
            self._prefetches_by_owner += Counter()  # without those that are 0 now
            self._prefetch_count -= 1

    def rewind_runs(self, object_fetch: ObjectFetch) -> None:
        """Blocks of this fetch were in flight, and did not come: the orders that hold it are searched once more."""
        for runs in self.ordered_runs:
            if object_fetch in runs.fetches:
                runs.rewind()

    def bytes_until_complete(self, object_fetch: ObjectFetch) -> int:
        """Bytes that will be fetched before the last of this file's, its own included."""
        total = 0
        for runs in self.ordered_runs:
            total += runs.bytes_until_complete(object_fetch)
            if object_fetch in runs.fetches:
                return total
        for other in self.whole_files:
            total += other.stored.missing_block_count * other.stored.block_size
            if other is object_fetch:
                break
        return total
