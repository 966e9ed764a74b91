"""Bytes that are not in the store are brought there: one flight per block, and whole files on their first read.

Theory of operation. A reader asks for bytes that are not there (`request_bytes`) and is told when they are; a fixed
number of threads fly (worker_pool.py). A free thread does what the scheduler says is next (scheduler.py). A waiter is
settled when its own blocks are there, by the thread that brought the last of them. A reader that goes away cancels no
flight: others may wait for it.

One lock, the *scheduling lock*, guards all state of the parts: fetches, waiters, queues, and what an observer of reads
keeps. It is held for microseconds, never across I/O or a callback of a waiter. A method whose name ends in `_locked`
is called with it.

Interleavings worth knowing. (1) A block arrives between a reader's look at the store and its `request_bytes`: that
looks again under the lock which `block_arrived` takes, so it is found there. (2) A block is found bad while a reader
reads it: the file is not rewritten in place while others have it open (the store sees to that). (3) A flight fails
while new readers join: those that came after its start are flown for again, the others get its error.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping

from fusecache.blocks import block_range
from fusecache.errors import UnavailableError
from fusecache.events import EventHub
from fusecache.fetch.attestation_gate import AttestationGate
from fusecache.fetch.attestation_queue import AttestationQueue
from fusecache.fetch.block_source import BlockSource
from fusecache.fetch.copying import copy_stored_bytes
from fusecache.fetch.deadline_clock import DeadlineClock
from fusecache.fetch.dispatcher import WorkDispatcher
from fusecache.fetch.fetch_table import FetchTable
from fusecache.fetch.flight_runner import FlightRunner
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.read_observer import ReadObservers
from fusecache.fetch.scheduler import FetchScheduler
from fusecache.fetch.settings import FetchSettings
from fusecache.fetch.waiter import Waiter
from fusecache.fetch.waiter_table import WaiterTable
from fusecache.fetch.work_runner import WorkRunner
from fusecache.fetch.worker_pool import Wakeups, WorkerPool
from fusecache.locking import OwnedLock
from fusecache.store.interface import BlockStore
from fusecache.types import ObjectVersion

_SLOW_BYTES_PER_SECOND = 256 << 20
"""Bytes per second up to which the daemon keeps up with what arrives: then its readers can be observed."""
_MAX_READ_TRIES = 3


class FetchService:
    """Brings object versions into `store` from where `block_source` has them. Thread-safe; `start` and `close`, or a
    with block, own its threads. `observers` are told of readers, `events` of objects that are complete or gone;
    without an `attestation_queue` no object is inspected."""

    def __init__(
        self,
        store: BlockStore,
        block_source: BlockSource,
        settings: FetchSettings,
        *,
        events: EventHub,
        observers: ReadObservers | None = None,
        attestation_queue: AttestationQueue | None = None,
    ) -> None:
        self.store = store
        self.lock = self._lock = OwnedLock()
        """The scheduling lock."""
        self.observers = observers or ReadObservers()
        self._block_source = block_source
        self._settings = settings
        self._wakeups = Wakeups(self._lock)
        self.scheduler = FetchScheduler(
            max(1, settings.range_bytes // store.block_size),
            origin_workers=settings.concurrency,
            max_prefetch_flights=block_source.max_prefetch_flights,
        )
        self.dispatcher = WorkDispatcher(
            self._lock,
            self.scheduler,
            self._wakeups,
            observer=self.observers,
            fetches_whole_files=settings.prefetch,
        )
        self.fetches = FetchTable(
            self._lock,
            store,
            block_source,
            observer=self.observers,
            is_scheduled_locked=self.scheduler.prefetches.has_file,
        )
        self.waiters = WaiterTable(self._lock, self._wakeups)
        self.attestation_gate = AttestationGate(
            self._lock,
            attestation_queue,
            waiters=self.waiters,
            fetches=self.fetches,
            prefetches=self.scheduler.prefetches,
            events=events,
            stall_timeout=settings.deadline,
        )
        self._flights = FlightRunner(
            self._lock,
            block_source,
            scheduler=self.scheduler,
            dispatcher=self.dispatcher,
            fetches=self.fetches,
            waiters=self.waiters,
            gate=self.attestation_gate,
            events=events,
            deadline=settings.deadline,
        )
        self.stats = self._flights.stats
        runner = WorkRunner(
            self._lock,
            self.scheduler,
            wakeups=self._wakeups,
            dispatcher=self.dispatcher,
            fetches=self.fetches,
            flights=self._flights,
            gate=self.attestation_gate,
            events=events,
        )
        self.start_file = runner.start_file
        self._worker_pool = WorkerPool(self._lock, self._wakeups, runner.next_work_locked)
        self._clock = DeadlineClock(
            self._lock,
            self._wakeups,
            waiters=self.waiters,
            timed=self.scheduler.timed,
            dispatcher=self.dispatcher,
            gate=self.attestation_gate,
            deadline=settings.deadline,
        )

    # -- life

    def start(self) -> None:
        """Start the threads."""
        self._worker_pool.start_threads(self._settings.concurrency, self._block_source.peer_workers)
        self._clock.start()

    def close(self, timeout: float = 10.0) -> None:
        """End: flights are cancelled, waiters get CancelledReadError. Waits `timeout` seconds at most."""
        self.observers.close()
        self._flights.stop()
        with self._lock:
            self._worker_pool.stop_locked()
            self._clock.stop_locked()
        self.waiters.close()
        deadline = time.monotonic() + timeout
        self._worker_pool.join_threads(deadline)
        self._clock.join(deadline)
        self.fetches.close()

    def __enter__(self) -> FetchService:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- opening and closing

    def open_object(self, version: ObjectVersion, source: str) -> ObjectFetch:
        """The fetch of this version, opened once more; pair it with `release_fetch`. Does disk I/O. Raises
        StoreError."""
        object_fetch = self.fetches.acquire(version, source)
        object_fetch.stored.count_access()
        return object_fetch

    def reopen(self, object_fetch: ObjectFetch) -> bool:
        """Open an open fetch once more, without I/O; False: it is out of date."""
        return self.fetches.reopen(object_fetch)

    def release_fetch(self, object_fetch: ObjectFetch) -> None:
        """Open it once less. Flights that were begun go on."""
        self.fetches.release(object_fetch)

    def update_routes(self) -> None:
        """Nodes came or went: ask the block source anew where the stripes come from. May take milliseconds."""
        routes = self.fetches.new_routes()
        with self._lock:
            for object_fetch, route in routes:
                object_fetch.set_route(route)
                self.dispatcher.queue_demand_locked(object_fetch, list(object_fetch.waiters.by_block))
            self._wakeups.wake_for_prefetch_locked()

    # -- readers

    def request_bytes(
        self,
        object_fetch: ObjectFetch,
        offset: int,
        length: int,
        on_settled: Callable[[Waiter], None],
        *,
        by_reader: bool = True,
        urgent: bool = True,
        is_header: bool = False,
    ) -> Waiter | None:
        """Ask for bytes. None: they are in the store; otherwise `on_settled` will be called, with the waiter. Raises
        the error that this version can't be had any more, and CancelledReadError when the mount goes away.
        `by_reader`: fetch all of the file, and give nothing of an unattested one before it is attested. `urgent`: it
        goes before all that no reader waits for, also other nodes' prefetch. `is_header`: nothing waits for it."""
        stored = object_fetch.stored
        blocks = block_range(offset, length, object_fetch.version.size, stored.block_size)
        with self._lock:
            is_first = by_reader and object_fetch.reader_asked(blocks.stop)
            awaits_attestation = by_reader and stored.is_unattested
            missing = [block for block in blocks if not stored.is_present(block)]
            now = time.monotonic()
            if missing and by_reader:
                self.scheduler.prefetches.reader_asked(now)
                self.observers.blocks_missed_locked(object_fetch, missing)
            waiter = None
            if missing or awaits_attestation:
                waiter = Waiter(
                    object_fetch.version.key,
                    offset,
                    length,
                    missing_blocks=missing,
                    waiting_since=now,
                    deadline=now + self._settings.deadline,
                    on_settled=on_settled,
                    urgent=urgent,
                    awaits_attestation=awaits_attestation,
                )
                self._add_waiter_locked(object_fetch, waiter, is_header=is_header)
            if is_first:
                self.dispatcher.want_whole_file_locked(object_fetch)
            self.attestation_gate.request_inspection_locked(object_fetch)
        if is_first:
            self.observers.whole_file_wanted(object_fetch.version, object_fetch.source)
        return waiter

    def await_attestation(
        self, object_fetch: ObjectFetch, on_settled: Callable[[Waiter], None]
    ) -> Waiter | None:
        """A program opens an object: if it is unattested, fetch all of it, have it inspected, and call `on_settled`
        then. None: it is attested, or needs no attestation. Raises as `request_bytes`."""
        with self._lock:
            if not object_fetch.stored.is_unattested:
                return None
            object_fetch.want_whole()
            now = time.monotonic()
            waiter = Waiter(
                object_fetch.version.key,
                0,
                0,
                missing_blocks=(),
                waiting_since=now,
                deadline=now + self._settings.deadline,
                on_settled=on_settled,
                awaits_attestation=True,
            )
            self._add_waiter_locked(object_fetch, waiter)
            self.attestation_gate.request_inspection_locked(object_fetch)
        self.observers.whole_file_wanted(object_fetch.version, object_fetch.source)
        return waiter

    def _add_waiter_locked(
        self, object_fetch: ObjectFetch, waiter: Waiter, *, is_header: bool = False
    ) -> None:
        self.waiters.add_locked(object_fetch, waiter)
        if waiter.awaits_attestation:
            self.dispatcher.add_whole_file_locked(object_fetch)
            self._wakeups.wake_for_prefetch_locked()
        self.dispatcher.queue_demand_locked(object_fetch, waiter.missing_blocks, is_header=is_header)

    def cancel_waiter(self, waiter: Waiter) -> bool:
        """The reader does not want it any more; False: it was, or is being, settled."""
        return self.waiters.cancel(waiter)

    def are_stored_or_in_flight(self, object_fetch: ObjectFetch, blocks: range) -> bool:
        """Whether each of these blocks is in the store or on its way."""
        with self._lock:
            return all(
                not object_fetch.idle[block] or object_fetch.stored.is_unverified(block) for block in blocks
            )

    def read_bytes(self, object_fetch: ObjectFetch, offset: int, length: int) -> bytes:
        """Wait for bytes, at most until the deadline, and copy them out of the store. For manifests, indexes, control
        and tests. Raises what `request_bytes` and the flights raise."""
        done = threading.Event()
        for _ in range(_MAX_READ_TRIES):
            done.clear()
            waiter = self.request_bytes(object_fetch, offset, length, lambda _waiter: done.set())
            if waiter is not None:
                done.wait()
                if waiter.error is not None:
                    raise waiter.error
            data = self.copy_bytes(object_fetch, offset, length, waiter.pieces if waiter else {})
            if data is not None:
                return data
        raise UnavailableError(f"{object_fetch.version.key}: the cached bytes can't be read")

    def copy_bytes(
        self, object_fetch: ObjectFetch, offset: int, length: int, pieces: Mapping[int, bytes]
    ) -> bytes | None:
        """Bytes that are present, some of them in a waiter's pieces. Does disk I/O. None: the disk did not give them;
        then the block is looked at again."""
        data = copy_stored_bytes(object_fetch.stored, offset, length, pieces)
        if isinstance(data, int):
            self.recheck_block(object_fetch, data)
            return None
        return data

    def recheck_block(self, object_fetch: ObjectFetch, block: int) -> None:
        """The disk did not give a present block: check it, and fetch it anew if it is bad. Does disk I/O."""
        if not object_fetch.stored.verify_block(block):
            with self._lock:
                object_fetch.idle[block] = 1
                self.dispatcher.queue_demand_locked(
                    object_fetch, [block] if block in object_fetch.waiters.by_block else []
                )

    def fetch_whole_file(self, object_fetch: ObjectFetch) -> None:
        """A program is going to read all of this: fetch it, unless its last flights failed."""
        with self._lock:
            object_fetch.want_whole()
            if object_fetch.backoff.failure_count:
                return
            self.dispatcher.want_whole_file_locked(object_fetch)
        self.observers.whole_file_wanted(object_fetch.version, object_fetch.source)

    def seconds_until_complete(self, object_fetch: ObjectFetch) -> float | None:
        """How long it will take, at the rate of the last second, until this file is complete: infinity if it is not
        being fetched, None if not known yet."""
        with self._lock:
            now = time.monotonic()
            if object_fetch not in self.scheduler.prefetches.whole_files or object_fetch.stays_partial():
                return math.inf
            if self.observers.needs_exact_reads(object_fetch) and self._flights.is_slower_locked(
                _SLOW_BYTES_PER_SECOND, now
            ):
                return math.inf
            rate = self._flights.bytes_per_second_locked(now)
            return self.scheduler.prefetches.bytes_until_complete(object_fetch) / rate if rate else None

    def progress(self) -> dict[str, int]:
        """Figures for `fusecache status`."""
        with self._lock:
            return {
                "loads": len(self.fetches),
                "waiting_reads": len(self.waiters),
                **self.scheduler.progress(),
            }
