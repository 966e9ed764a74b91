"""Flights: each is run in a worker thread, and what it brings or fails to bring is told to the waiters."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

from fusecache.errors import (
    AccessDeniedError,
    CancelledReadError,
    FusecacheError,
    OriginError,
    StoreError,
    VersionChangedError,
)
from fusecache.events import EventHub
from fusecache.fetch import flight
from fusecache.fetch.attestation_gate import AttestationGate
from fusecache.fetch.block_source import BlockSource
from fusecache.fetch.dispatcher import WorkDispatcher
from fusecache.fetch.fetch_table import FetchTable
from fusecache.fetch.object_fetch import FlightPlan, ObjectFetch
from fusecache.fetch.scheduler import FetchScheduler
from fusecache.fetch.waiter import Waiter, settle_waiters
from fusecache.fetch.waiter_table import WaiterTable
from fusecache.locking import OwnedLock
from fusecache.throughput import Throughput

_log = logging.getLogger(__name__)

_RECHECK_SECONDS = 0.02
"""Seconds between looks at blocks that another process fetches."""
_BACKOFF_SECONDS = 5.0
"""Seconds without flights that have no waiter after one failed; grows with the failures."""
_MAX_BACKOFF_STEPS = 12
_MAX_FAILURES = 5
"""Failed flights in a row after which a file that no program has open is left as it is."""
_JOIN_SECONDS = 1.0
"""A waiter that came so many seconds after the start of a flight, or later, does not get its error: it is flown again
for that one."""


@dataclass
class FetchStats:
    """Counters since the start, guarded by the scheduling lock."""

    flights: int = 0
    flights_failed: int = 0
    bytes_uncached: int = 0
    """Fetched, and handed to the waiters without being stored."""


class FlightRunner:
    """The FlightListener of one service, whose scheduling lock is `lock`; methods without `_locked` take it. A flight
    has `deadline` seconds.

    | Flight | Event | What happens |
    |---|---|---|
    | under way | a block arrived | waiters that have all of theirs are settled, and an inspector may look |
    | under way | another process has claimed blocks | looked at again soon |
    | under way | it ends without an error | blocks that did not arrive are idle again |
    | under way | the version is gone | all waiters of the object get the error |
    | under way | the store failed | flown again for the waiters, past the store |
    | under way | the origin failed | waiters that were there at its start get the error; the file backs off |
    """

    def __init__(
        self,
        lock: OwnedLock,
        block_source: BlockSource,
        *,
        scheduler: FetchScheduler,
        dispatcher: WorkDispatcher,
        fetches: FetchTable,
        waiters: WaiterTable,
        gate: AttestationGate,
        events: EventHub,
        deadline: float,
    ) -> None:
        self.stats = FetchStats()
        self._lock = lock
        self._block_source = block_source
        self._scheduler = scheduler
        self._dispatcher = dispatcher
        self._fetches = fetches
        self._waiters = waiters
        self._gate = gate
        self._events = events
        self._deadline = deadline
        self._throughput = Throughput()
        self._is_stopping = False

    def stop(self) -> None:
        """Flights under way end soon, with CancelledReadError."""
        self._is_stopping = True

    def bytes_per_second_locked(self, now: float) -> float | None:
        """Bytes that arrived per second, in the last second; None: not known yet."""
        self._lock.assert_held()
        return self._throughput.bytes_per_second(now)

    def is_slower_locked(self, bytes_per_second: int, now: float) -> bool:
        """Whether less than this arrived in the last second, as far as that is known."""
        self._lock.assert_held()
        return self._throughput.is_below(bytes_per_second, now)

    def run(self, plan: FlightPlan) -> None:
        """Bring the blocks of this plan, or check them; blocks until the flight is over."""
        object_fetch, started_at = plan.object_fetch, time.monotonic()
        if not plan.is_verification:
            with self._lock:
                self.stats.flights += 1
        remaining, error = flight.run_flight(
            plan,
            self._block_source,
            self,
            deadline=started_at + self._deadline,
            cancelled=lambda: self._is_stopping or object_fetch.gone_error is not None,
        )
        self._flight_ended(plan, started_at, remaining, error)

    # -- what a flight tells while it is under way

    def block_arrived(self, object_fetch: ObjectFetch, block: int, piece: bytes | None) -> None:
        """The block is in the store, or only in `piece`: settles the waiters whose last block it was."""
        with self._lock:
            now, length = time.monotonic(), object_fetch.byte_count((block,))
            self._gate.note_progress_locked(now)
            self._throughput.add_arrival(now, length)
            if piece is not None:
                self.stats.bytes_uncached += length
            waiters = object_fetch.block_arrived(block, piece)
            self._waiters.remove_locked(waiters)
            self._gate.request_inspection_locked(object_fetch)
        settle_waiters(waiters, None)

    def blocks_claimed_elsewhere(self, object_fetch: ObjectFetch, blocks: range) -> None:
        """Another process fetches these: has them looked at again soon."""
        with self._lock:
            self._dispatcher.recheck_at_locked(time.monotonic() + _RECHECK_SECONDS, object_fetch, blocks)

    def trim_to_waited(self, object_fetch: ObjectFetch, blocks: range) -> range:
        """These can't be stored: returns the shortest prefix that holds all blocks with a waiter, and fails the readers
        that wait for the whole object."""
        with self._lock:
            stop = max(
                (block + 1 for block in blocks if block in object_fetch.waiters.by_block),
                default=blocks.start,
            )
            if stop == blocks.start and object_fetch.belongs_in_store(blocks.start):
                # no space, and nothing waits: blocks that are read later are asked for then
                self._scheduler.prefetches.drop_file(object_fetch)
        self._gate.fail_waiters_without_space(object_fetch)
        return range(blocks.start, stop)

    # -- the end of a flight

    def _flight_ended(
        self, plan: FlightPlan, started_at: float, remaining: Iterable[int], error: FusecacheError | None
    ) -> None:
        object_fetch = plan.object_fetch
        failed: list[Waiter] = []
        is_gone = False
        with self._lock:
            self._scheduler.flight_ended(plan)
            if error is None:
                object_fetch.backoff.flight_succeeded()
                self._dispatcher.queue_demand_locked(object_fetch, object_fetch.return_blocks(remaining))
                if (
                    object_fetch.fetch_whole
                    and object_fetch.open_count
                    and object_fetch.stored.is_present(plan.blocks[0])
                    and object_fetch.has_idle_blocks()
                ):
                    # it was set aside for want of space, or after failures
                    self._dispatcher.want_whole_file_locked(object_fetch)
            else:
                self.stats.flights_failed += 1
                self._scheduler.prefetches.rewind_runs(object_fetch)
                failed, is_gone = self._flight_failed_locked(plan, started_at, error)
            if object_fetch.stored.is_complete or is_gone:
                self._scheduler.prefetches.drop_file(object_fetch)
            is_removed = self._fetches.remove_if_unused_locked(object_fetch)
            is_servable = object_fetch.stored.is_servable
        settle_waiters(failed, error)
        if is_servable:
            self._events.object_completed.publish(object_fetch.version)
        if is_gone:
            self._events.object_gone.publish(object_fetch.version)
        if is_removed:
            object_fetch.stored.close()

    def _flight_failed_locked(
        self, plan: FlightPlan, started_at: float, error: FusecacheError
    ) -> tuple[list[Waiter], bool]:
        """Returns the waiters that get the error, and whether this flight was the first to find the version gone."""
        object_fetch = plan.object_fetch
        wanted = object_fetch.return_blocks(
            block
            for block in plan.blocks
            if not object_fetch.stored.is_present(block)
            and not self._scheduler.timed.has_recheck(object_fetch, block)
        )
        if isinstance(error, VersionChangedError):
            is_gone = object_fetch.gone_error is None
            object_fetch.give_up(error)
            victims = object_fetch.waiters.all()
            self._waiters.drop_locked(victims)
            return list(victims), is_gone
        if isinstance(error, StoreError | CancelledReadError):
            # the store is passed over from now on (its health says so): fly again for the waiters
            self._dispatcher.queue_demand_locked(object_fetch, wanted)
            return [], False
        self._back_off_locked(object_fetch, error)
        denied = not isinstance(error, OriginError) or isinstance(error, AccessDeniedError)
        candidates = {
            waiter for block in wanted for waiter in object_fetch.waiters.by_block.get(block, ())
        }.union(object_fetch.waiters.of_attestation)
        victims = {
            waiter for waiter in candidates if denied or waiter.waiting_since <= started_at + _JOIN_SECONDS
        }
        self._waiters.drop_locked(victims)
        self._dispatcher.queue_demand_locked(
            object_fetch, [block for block in wanted if block in object_fetch.waiters.by_block]
        )
        return list(victims), False

    def _back_off_locked(self, object_fetch: ObjectFetch, error: FusecacheError) -> None:
        """Fetch nothing of this file without a waiter for a while, and after some failures only while it is open."""
        failures = object_fetch.backoff.flight_failed(time.monotonic(), _BACKOFF_SECONDS, _MAX_BACKOFF_STEPS)
        if failures in (1, 10) or failures % 100 == 0:
            _log.warning("%s: %s", object_fetch.version.key, error)
        if failures >= _MAX_FAILURES and not object_fetch.open_count:
            self._scheduler.prefetches.drop_file(object_fetch)
        self._dispatcher.recheck_at_locked(object_fetch.backoff.until, object_fetch, range(0))
