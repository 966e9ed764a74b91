"""The loader: one fetch per block, whole files on their first read, then the shards behind them.

Readers ask for bytes that are not there (`request`) and are told when they are; a fixed
crew of threads (crew.py) flies. A free thread takes, in this order: a block a reader waits for, with the idle
blocks behind it up to `range_bytes`; a block that another node's prefetch waits for; the next run ahead of a
reader, of each file in turn; a file of the prefetch plan. A waiter is woken when its own blocks are in, by the
thread that landed the last of them.

Ownership: `_lock` guards all scheduling state (loads, waiters, queues) and is held for microseconds, never
across I/O or a callback. A reader that goes away cancels no flight: others may wait for it.

Interleavings worth knowing. (1) A block lands between a reader's look at the store and its `request`: request
looks again under the lock that `land` takes, so it is found there. (2) A block is found bad while somebody
reads it: the file is not rewritten in place while others have it open (see store). (3) A flight fails while new
readers join: those that came after its start fly again, the others get its error.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from fusecache.blocks import block_range
from fusecache.errors import (
    AccessDeniedError,
    CancelledReadError,
    FusecacheError,
    OriginError,
    StoreError,
    UnavailableError,
    VersionChangedError,
)
from fusecache.fetch import flight
from fusecache.fetch.attestation_gate import AttestationGate
from fusecache.fetch.block_source import BlockSource, OriginBlockSource, Route
from fusecache.fetch.copying import copy_stored_bytes, read_when_present
from fusecache.fetch.interface import (
    CatalogView,
    FetchSettings,
    FetchStats,
    Inspector,
    PeerProfiles,
    Shelf,
)
from fusecache.fetch.object_fetch import FlightPlan, ObjectFetch
from fusecache.fetch.scheduler import FetchScheduler
from fusecache.fetch.waiter import Waiter, settle_waiters
from fusecache.fetch.worker_pool import WorkerPool
from fusecache.prefetch.companion_prefetcher import CompanionPrefetcher
from fusecache.prefetch.sessions import SessionTracker
from fusecache.prefetch.shard_prefetcher import ShardPrefetcher
from fusecache.store.interface import BlockStore
from fusecache.throughput import Throughput
from fusecache.types import ObjectId, ObjectVersion

if TYPE_CHECKING:
    from fusecache.origin.interface import Origin

_log = logging.getLogger(__name__)

_RECHECK_SECONDS = 0.02
"""Seconds between looks at blocks that another process fetches."""
_BACKOFF_SECONDS = 5.0
"""Seconds without flights nobody waits for after one failed; grows with the failures."""
_MAX_FAILURES = 5
"""Failed flights in a row after which a file nobody has open is left as it is."""
_SLOW_BYTES_PER_SECOND = 256 << 20
"""Bytes per second up to which the daemon keeps up with what arrives: then its readers can be listened to."""


class FetchService:
    """Brings object versions into `store` from `origins` (by source name), or where `supplier` has them.
    Thread-safe; `start` and `close`, or a with block, own the crew."""

    def __init__(
        self,
        store: BlockStore,
        origins: Mapping[str, Origin],
        catalog: CatalogView,
        settings: FetchSettings,
        block_source: BlockSource | None = None,
        profile_store: Shelf | None = None,
        peer_profiles: PeerProfiles | None = None,
        inspector: Inspector | None = None,
    ) -> None:
        self.store = store
        self.stats = FetchStats()
        self._block_source: BlockSource = block_source or OriginBlockSource(origins)
        self._catalog = catalog
        self._settings = settings
        self.lock = self._lock = threading.Lock()
        self._worker_pool = WorkerPool(self._lock, self)
        self._clock_wakeup = threading.Condition(self._lock)
        self._fetches: dict[ObjectId, ObjectFetch] = {}
        limit = max(1, settings.range_bytes // store.block_size)
        self._scheduler = FetchScheduler(
            limit,
            lambda *file: self._shard_prefetcher.start_file(*file),
            origin_workers=settings.concurrency,
            max_prefetch_flights=self._block_source.max_prefetch_flights,
        )
        self._shard_prefetcher = ShardPrefetcher(self, self._scheduler, catalog, settings.prefetch_budget)
        self._companion_prefetcher = CompanionPrefetcher(catalog, self._shard_prefetcher.start_file)
        self.session_tracker = SessionTracker(
            self, self._scheduler, catalog, settings, self._shard_prefetcher, profile_store, peer_profiles
        )
        self._throughput = Throughput()
        self._waiters: set[Waiter] = set()
        self.attestation_gate = AttestationGate(
            self._lock,
            self._waiters,
            self._scheduler,
            inspector,
            stall_timeout=settings.deadline,
            on_attested=lambda load: catalog.version_completed(load.version),
            remove_if_unused_locked=self._remove_if_unused_locked,
        )
        self._is_stopping = False
        self._clock_thread = threading.Thread(target=self._run_clock, name="loader-clock", daemon=True)

    # -- life

    def start(self) -> None:
        """Start the crew."""
        self._worker_pool.start_threads(self._settings.concurrency, self._block_source.peer_workers)
        self._clock_thread.start()

    def close(self, timeout: float = 10.0) -> None:
        """Stop the crew: flights are cancelled, waiters get CancelledReadError. Waits `timeout` seconds at most."""
        self.session_tracker.close()
        with self._lock:
            self._is_stopping = True
            waiters = list(self._waiters)
            for waiter in waiters:
                self._drop_waiter_locked(waiter)
            self._worker_pool.stop_locked()
            self._clock_wakeup.notify_all()
        settle_waiters(waiters, CancelledReadError("the mount is going away"))
        deadline = time.monotonic() + timeout
        self._worker_pool.join_threads(deadline)
        if self._clock_thread.is_alive():
            self._clock_thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            loads = list(self._fetches.values())
            self._fetches.clear()
        for object_fetch in loads:
            object_fetch.stored.close()

    def __enter__(self) -> FetchService:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- readers

    def open_object(self, version: ObjectVersion, source: str) -> ObjectFetch:
        """The load of this version, opened once more; does disk I/O. Pair with `release`."""
        object_fetch = self.acquire_fetch(version, source)
        object_fetch.stored.count_access()
        return object_fetch

    def reopen(self, object_fetch: ObjectFetch) -> bool:
        """Open an open load once more, without I/O; False: it is out of date."""
        with self._lock:
            still = (
                self._fetches.get(object_fetch.version.id) is object_fetch
                and not object_fetch.stored.is_retired
            )
            object_fetch.open_count += still
        return still

    def acquire_fetch(self, version: ObjectVersion, source: str) -> ObjectFetch:
        """See Office."""
        with self._lock:
            object_fetch = self._fetches.get(version.id)
            if object_fetch is not None and not object_fetch.stored.is_retired:
                object_fetch.open_count += 1
                return object_fetch
        stored = self.store.open(version)
        fresh = ObjectFetch(version, source, stored)
        self.attestation_gate.refuse_if_quarantined(fresh)
        fresh.set_route(self._block_source.route_of(version, stored.block_size))
        self.session_tracker.attach_model(fresh)
        with self._lock:
            object_fetch = self._fetches.get(version.id)
            if object_fetch is None or object_fetch.stored.is_retired:
                object_fetch = self._fetches[version.id] = fresh
            object_fetch.open_count += 1
        if object_fetch is not fresh:
            stored.close()
        return object_fetch

    def update_routes(self) -> None:
        """Nodes came or went: ask the supplier anew where the stripes come from."""
        with self._lock:
            loads = list(self._fetches.values())
        routes: list[tuple[ObjectFetch, Route | None]] = [
            (object_fetch, self._block_source.route_of(object_fetch.version, object_fetch.stored.block_size))
            for object_fetch in loads
        ]
        with self._lock:
            for object_fetch, route in routes:
                object_fetch.set_route(route)
                self._queue_demand_locked(object_fetch, list(object_fetch.waiters_by_block))
            self._worker_pool.wake_for_prefetch_locked()

    def release_fetch(self, object_fetch: ObjectFetch) -> None:
        """Drop one open. What was begun goes on."""
        with self._lock:
            object_fetch.open_count -= 1
            closing = self._remove_if_unused_locked(object_fetch)
        if closing:
            object_fetch.stored.close()

    def _remove_if_unused_locked(self, object_fetch: ObjectFetch) -> bool:
        """Whether this call took it out of the table, so that the caller has to close it."""
        if not object_fetch.is_unused() or self._scheduler.has_file(object_fetch):
            return False
        if self._fetches.get(object_fetch.version.id) is object_fetch:
            del self._fetches[object_fetch.version.id]
            return True
        return object_fetch.stored.is_retired

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
        """Ask for bytes. None: they are in the store; otherwise `settled` will be called (see Waiter). Raises the
        error that this version can't be had any more. `whole`: a reader asks, so fetch all of the file, and give
        nothing of a sealed one before it was vouched for (see gate.py). `urgent`: it goes before what nobody waits for,
        and before other nodes' prefetch. `head`: nobody waits for it."""
        stored = object_fetch.stored
        blocks = block_range(offset, length, object_fetch.version.size, stored.block_size)
        with self._lock:
            first = by_reader and not object_fetch.fetch_whole
            if by_reader:
                object_fetch.fetch_whole = object_fetch.has_reader = True
                object_fetch.read_position = blocks.stop
            sealed = by_reader and stored.is_unattested
            missing = [block for block in blocks if not stored.is_present(block)]
            waiter = None
            if missing and by_reader:
                self.session_tracker.blocks_requested_locked(object_fetch, missing)
            if missing or sealed:
                waiter = self._add_waiter_locked(
                    object_fetch,
                    offset,
                    length,
                    missing,
                    on_settled,
                    is_header=is_header,
                    urgent=urgent,
                    awaits_attestation=sealed,
                )
            if first:
                self._schedule_whole_file_locked(object_fetch)
            look = self.attestation_gate.begin_inspection_locked(object_fetch)
        self.attestation_gate.request_inspection(object_fetch, look)
        if first:
            self.file_read(object_fetch.version, object_fetch.source)
        return waiter

    def request_header(
        self, object_fetch: ObjectFetch, offset: int, length: int, on_settled: Callable[[Waiter], None]
    ) -> Waiter | None:
        """See Office."""
        return self.request_bytes(
            object_fetch, offset, length, on_settled, by_reader=False, urgent=False, is_header=True
        )

    def await_attestation(
        self, object_fetch: ObjectFetch, on_settled: Callable[[Waiter], None]
    ) -> Waiter | None:
        """Somebody opens an object: if it is sealed, fetch all of it, have it looked at, and call `settled` then. None:
        it is not. Raises as `request`."""
        with self._lock:
            if not object_fetch.stored.is_unattested:
                return None
            object_fetch.fetch_whole = True
            waiter = self._add_waiter_locked(object_fetch, 0, 0, (), on_settled, awaits_attestation=True)
            look = self.attestation_gate.begin_inspection_locked(object_fetch)
        self.attestation_gate.request_inspection(object_fetch, look)
        self.file_read(object_fetch.version, object_fetch.source)
        return waiter

    def _add_waiter_locked(
        self,
        object_fetch: ObjectFetch,
        offset: int,
        length: int,
        missing: Sequence[int],
        on_settled: Callable[[Waiter], None],
        *,
        is_header: bool = False,
        **waiter_flags: bool,
    ) -> Waiter:
        """Under the lock. `more` is for Waiter. Raises as `request`."""
        if object_fetch.gone_error is not None or self._is_stopping:
            raise object_fetch.gone_error or CancelledReadError("the mount is going away")
        now = time.monotonic()
        deadline = now + self._settings.deadline
        waiter = Waiter(
            object_fetch,
            offset,
            length,
            missing_blocks=missing,
            waiting_since=now,
            deadline=deadline,
            on_settled=on_settled,
            **waiter_flags,
        )
        self._waiters.add(waiter)
        if object_fetch.add_waiter(waiter):
            self._scheduler.add_whole_file(object_fetch)
            self._worker_pool.wake_for_prefetch_locked()
        self._queue_demand_locked(object_fetch, waiter.missing_blocks, is_header=is_header)
        if len(self._waiters) == 1:
            self._clock_wakeup.notify()
        return waiter

    def are_stored_or_in_flight(self, object_fetch: ObjectFetch, blocks: range) -> bool:
        """Whether each of these blocks is in the store or on its way."""
        with self._lock:
            return all(
                not object_fetch.idle[block] or object_fetch.stored.is_unverified(block) for block in blocks
            )

    def cancel_waiter(self, waiter: Waiter) -> bool:
        """Nobody wants this any more; False: it was, or is being, settled."""
        with self._lock:
            if waiter not in self._waiters:
                return False
            self._drop_waiter_locked(waiter)
            return True

    def is_waiting(self, waiter: Waiter) -> bool:
        """Whether it is unsettled."""
        with self._lock:
            return waiter in self._waiters

    def read_bytes(self, object_fetch: ObjectFetch, offset: int, length: int) -> bytes:
        """See gather.read."""
        return read_when_present(self, object_fetch, offset, length)

    def copy_bytes(
        self, object_fetch: ObjectFetch, offset: int, length: int, pieces: Mapping[int, bytes]
    ) -> bytes | None:
        """Present bytes, some of them from a waiter's pieces; None: the disk did not give them."""
        data = copy_stored_bytes(object_fetch.stored, offset, length, pieces)
        if isinstance(data, int):
            self.recheck_block(object_fetch, data)
            return None
        return data

    def recheck_block(self, object_fetch: ObjectFetch, block: int) -> None:
        """The disk did not give a present block: look at it again, and fetch it anew if it is bad."""
        if not object_fetch.stored.verify_block(block):
            with self._lock:
                object_fetch.idle[block] = 1
                self._queue_demand_locked(
                    object_fetch, [block] if block in object_fetch.waiters_by_block else []
                )

    def prefetch_files(self, versions: Iterable[tuple[ObjectVersion, str]]) -> None:
        """Fetch these versions (of these sources), in this order, without a reader."""
        self._shard_prefetcher.prefetch_files(versions)

    def fetch_whole_file(self, object_fetch: ObjectFetch) -> None:
        """Somebody is going to read all of this: fetch it, and then what follows."""
        with self._lock:
            object_fetch.fetch_whole = True
            if object_fetch.failure_count:
                return
            self._schedule_whole_file_locked(object_fetch)
        self.file_read(object_fetch.version, object_fetch.source)

    def seconds_until_complete(self, object_fetch: ObjectFetch) -> float | None:
        """How long it will take, at the pace of the last second, until this load is complete: infinity if it is not
        being fetched, None if not known yet."""
        with self._lock:
            now = time.monotonic()
            if object_fetch not in self._scheduler.whole_files or object_fetch.stays_partial():
                return math.inf
            if object_fetch.needs_exact_reads() and self._throughput.is_below(_SLOW_BYTES_PER_SECOND, now):
                return math.inf
            pace = self._throughput.bytes_per_second(now)
            return self._scheduler.bytes_until_complete(object_fetch) / pace if pace else None

    def pause_prefetch(self) -> None:
        """No more flights that nobody waits for."""
        with self._lock:
            self._scheduler.pause_prefetch()

    def file_read(self, version: ObjectVersion, source: str) -> None:
        """A file is being read: fetch what comes along, and what its reader will want next, if it is a shard, or the
        config of a model."""
        if not self._settings.prefetch:
            return
        if self._companion_prefetcher.mark_if_due(version):
            self.queue_task(lambda: self._companion_prefetcher.prefetch_companions(version, source))
        if not self.session_tracker.begin_session(version, source):
            self._shard_prefetcher.plan_after(version, source)

    def progress(self) -> dict[str, int]:
        """What is going on, for `fusecache status`."""
        with self._lock:
            return {
                "loads": len(self._fetches),
                "waiting_reads": len(self._waiters),
                **self._scheduler.progress(),
            }

    # -- the crew

    def next_work_locked(self, demand_only: bool, remote: bool) -> FlightPlan | Callable[[], None] | None:
        """See crew.Employer."""
        job = self._scheduler.next_work(demand_only, time.monotonic(), remote)
        if job is not None and self._scheduler.has_demand(remote):
            self._worker_pool.wake_for_kind_locked(remote)
        if (
            remote
            and isinstance(job, FlightPlan)
            and job.object_fetch.route is not None
            and job.object_fetch.route.is_origin_ordered
        ):
            self._worker_pool.general_wakeup.notify()  # it may be the turn of a stripe of our own
        return job

    def run_work(self, work: FlightPlan | Callable[[], None]) -> None:
        """See crew.Employer."""
        if isinstance(work, FlightPlan):
            self._run_flight(work)
        else:
            work()

    def _run_flight(self, plan: FlightPlan) -> None:
        object_fetch, started = plan.object_fetch, time.monotonic()
        if not plan.is_verification:
            with self._lock:
                self.stats.flights += 1
        left, error = flight.run_flight(
            plan,
            self._block_source,
            self,
            deadline=started + self._settings.deadline,
            cancelled=lambda: self._is_stopping or object_fetch.gone_error is not None,
        )
        self._flight_ended(plan, started, left, error)

    def _flight_ended(
        self, plan: FlightPlan, started: float, remaining: Iterable[int], error: FusecacheError | None
    ) -> None:
        object_fetch = plan.object_fetch
        failed: list[Waiter] = []
        gone = False
        with self._lock:
            self._scheduler.flight_ended(plan)
            if error is None:
                object_fetch.failure_count = 0
                self._queue_demand_locked(object_fetch, object_fetch.return_blocks(remaining))
                if (
                    object_fetch.fetch_whole
                    and object_fetch.open_count
                    and object_fetch.stored.is_present(plan.blocks[0])
                    and object_fetch.has_idle_blocks()
                ):
                    self._schedule_whole_file_locked(
                        object_fetch
                    )  # it was set aside for want of space, or after failures
            else:
                self.stats.flights_failed += 1
                self._scheduler.rewind_runs(object_fetch)
                failed, gone = self._flight_failed_locked(plan, started, error)
            if object_fetch.stored.is_complete or (gone and self._scheduler.has_file(object_fetch)):
                self._scheduler.drop_file(object_fetch)
            closing = self._remove_if_unused_locked(object_fetch)
            complete = object_fetch.stored.is_servable
        settle_waiters(failed, error)
        if complete:
            self._catalog.version_completed(object_fetch.version)
        if gone:
            self._catalog.version_gone(object_fetch.version)
        if closing:
            object_fetch.stored.close()

    def _flight_failed_locked(
        self, plan: FlightPlan, started: float, error: FusecacheError
    ) -> tuple[list[Waiter], bool]:
        """Under the lock: who has to be told, and whether this version is gone."""
        object_fetch = plan.object_fetch
        unlanded = [block for block in plan.blocks if not object_fetch.stored.is_present(block)]
        wanted = object_fetch.return_blocks(
            block for block in unlanded if not self._scheduler.has_recheck(object_fetch, block)
        )
        if isinstance(error, VersionChangedError):
            gone = object_fetch.gone_error is None
            object_fetch.gone_error = error
            victims = {waiter for waiters in object_fetch.waiters_by_block.values() for waiter in waiters}
            victims.update(object_fetch.attestation_waiters)
            for waiter in victims:
                self._drop_waiter_locked(waiter)
            return list(victims), gone
        if isinstance(error, StoreError | CancelledReadError):
            # the store is passed over from now on (its health says so): fly again for those who wait
            self._queue_demand_locked(object_fetch, wanted)
            return [], False
        object_fetch.failure_count += 1
        object_fetch.backoff_until = time.monotonic() + _BACKOFF_SECONDS * min(object_fetch.failure_count, 12)
        if object_fetch.failure_count in (1, 10) or object_fetch.failure_count % 100 == 0:
            _log.warning("%s: %s", object_fetch.version.key, error)
        if (
            object_fetch.failure_count >= _MAX_FAILURES
            and not object_fetch.open_count
            and self._scheduler.has_file(object_fetch)
        ):
            self._scheduler.drop_file(object_fetch)
        self._scheduler.schedule_recheck(object_fetch.backoff_until, object_fetch, range(0))
        self._clock_wakeup.notify()
        denied = not isinstance(error, OriginError) or isinstance(error, AccessDeniedError)
        victims = {
            waiter
            for block in wanted
            for waiter in object_fetch.waiters_by_block.get(block, ())
            if denied or waiter.waiting_since <= started + 1.0
        }
        victims.update(
            w for w in object_fetch.attestation_waiters if denied or w.waiting_since <= started + 1.0
        )
        for waiter in victims:
            self._drop_waiter_locked(waiter)
        self._queue_demand_locked(
            object_fetch, [block for block in wanted if block in object_fetch.waiters_by_block]
        )
        return list(victims), False

    # -- what flights tell

    def block_arrived(self, object_fetch: ObjectFetch, block: int, piece: bytes | None) -> None:
        """See flight.Tower."""
        with self._lock:
            length = object_fetch.byte_count((block,))
            self.attestation_gate.last_progress_at = time.monotonic()
            self._throughput.add_arrival(self.attestation_gate.last_progress_at, length)
            if piece is not None:
                self.stats.bytes_uncached += length
            waiters = object_fetch.block_arrived(block, piece)
            self._waiters.difference_update(waiters)
            look = self.attestation_gate.begin_inspection_locked(object_fetch)
        settle_waiters(waiters, None)
        self.attestation_gate.request_inspection(object_fetch, look)

    def blocks_claimed_elsewhere(self, object_fetch: ObjectFetch, blocks: range) -> None:
        """See flight.Tower."""
        with self._lock:
            due = time.monotonic() + _RECHECK_SECONDS
            self._scheduler.schedule_recheck(due, object_fetch, blocks)
            self._clock_wakeup.notify()

    def trim_to_waited(self, object_fetch: ObjectFetch, blocks: range) -> range:
        """See flight.Tower."""
        with self._lock:
            stop = max(
                (block + 1 for block in blocks if block in object_fetch.waiters_by_block),
                default=blocks.start,
            )
            if (
                stop == blocks.start
                and object_fetch.belongs_in_store(blocks.start)
                and self._scheduler.has_file(object_fetch)
            ):
                self._scheduler.drop_file(
                    object_fetch
                )  # no space, and nobody waits: what is read later is asked for then
        self.attestation_gate.fail_waiters_without_space(object_fetch)
        return range(blocks.start, stop)

    # -- under the lock

    def _queue_demand_locked(
        self, object_fetch: ObjectFetch, blocks: Iterable[int], *, is_header: bool = False
    ) -> None:
        if self._scheduler.queue_demand(object_fetch, blocks, is_header=is_header):
            self._worker_pool.wake_for_demand_locked()

    def _schedule_whole_file_locked(self, object_fetch: ObjectFetch) -> None:
        if self._settings.prefetch:
            self.session_tracker.hold_back_locked(object_fetch)
            if self._scheduler.add_whole_file(object_fetch):
                self._worker_pool.wake_for_prefetch_locked()

    def _drop_waiter_locked(self, waiter: Waiter) -> None:
        self._waiters.discard(waiter)
        waiter.object_fetch.drop_waiter(waiter)

    def find_fetch_locked(self, object_id: ObjectId) -> ObjectFetch | None:
        """See Office."""
        return self._fetches.get(object_id)

    def wake_workers_locked(self) -> None:
        """See Office."""
        self._worker_pool.wake_for_prefetch_locked()
        self._clock_wakeup.notify()

    def queue_task(self, task: Callable[[], None]) -> None:
        """See Office."""
        with self._lock:
            self._scheduler.tasks.append(task)
            self._worker_pool.general_wakeup.notify()

    def inspect_if_unattested(self, object_fetch: ObjectFetch) -> None:
        """See Office."""
        with self._lock:
            look = self.attestation_gate.begin_inspection_locked(object_fetch)
        self.attestation_gate.request_inspection(object_fetch, look)

    def close_if_unused(self, object_fetch: ObjectFetch) -> None:
        """See Office."""
        with self._lock:
            closing = self._remove_if_unused_locked(object_fetch)
        if closing:
            object_fetch.stored.close()

    def _run_clock(self) -> None:
        """Expire waiters, and look again at what was put off."""
        while True:
            with self._lock:
                if self._is_stopping:
                    return
                now = time.monotonic()
                for object_fetch, blocks in self._scheduler.pop_due_rechecks(now):
                    self._queue_demand_locked(object_fetch, object_fetch.return_blocks(blocks))
                    self._worker_pool.general_wakeup.notify()
                    self._worker_pool.remote_wakeup.notify()
                if self._scheduler.tasks:
                    self._worker_pool.general_wakeup.notify()
                expired = [
                    waiter for waiter in self._waiters if self.attestation_gate.is_expired_locked(waiter, now)
                ]
                for waiter in expired:
                    self._drop_waiter_locked(waiter)
                if not expired:
                    pause = 0.5 if self._waiters else None
                    due = self._scheduler.next_due_at
                    if due is not None:
                        pause = max(0.001, min(due - now, pause or due - now))
                    self._clock_wakeup.wait(pause)
                    continue
            for waiter in expired:
                text = f"{waiter.object_fetch.version.key}: not within the deadline of {self._settings.deadline:g} s"
                settle_waiters([waiter], UnavailableError(text))
