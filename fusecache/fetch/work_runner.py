"""The work of a worker thread: a flight, the beginning of a planned file, or a task."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable

from fusecache.errors import FusecacheError
from fusecache.events import EventHub
from fusecache.fetch.attestation_gate import AttestationGate
from fusecache.fetch.dispatcher import WorkDispatcher
from fusecache.fetch.fetch_table import FetchTable
from fusecache.fetch.flight_runner import FlightRunner
from fusecache.fetch.object_fetch import FlightPlan
from fusecache.fetch.prefetch_queues import PlannedFile
from fusecache.fetch.scheduler import FetchScheduler
from fusecache.fetch.worker_pool import Wakeups
from fusecache.locking import OwnedLock
from fusecache.types import ObjectVersion

_log = logging.getLogger(__name__)


class WorkRunner:
    """Turns what the scheduler hands out into work. `lock` is the scheduling lock; `start_file` takes it."""

    def __init__(
        self,
        lock: OwnedLock,
        scheduler: FetchScheduler,
        *,
        wakeups: Wakeups,
        dispatcher: WorkDispatcher,
        fetches: FetchTable,
        flights: FlightRunner,
        gate: AttestationGate,
        events: EventHub,
    ) -> None:
        self._lock = lock
        self._scheduler = scheduler
        self._wakeups = wakeups
        self._dispatcher = dispatcher
        self._fetches = fetches
        self._flights = flights
        self._gate = gate
        self._events = events

    def next_work_locked(self, demand_only: bool, remote: bool) -> Callable[[], None] | None:
        """The next work of a thread, to be called without the lock: `remote` blocks from other nodes, otherwise all the
        rest; `demand_only` for readers. None: nothing now."""
        self._lock.assert_held()
        work = self._scheduler.next_work(demand_only, time.monotonic(), remote)
        if work is None:
            return None
        if self._scheduler.demand.has_blocks(remote):
            self._wakeups.wake_for_kind_locked(remote)
        if isinstance(work, FlightPlan):
            route = work.object_fetch.route
            if remote and route is not None and route.is_origin_ordered:
                self._wakeups.wake_one_locked()  # it may be the turn of a stripe of our own
            return functools.partial(self._flights.run, work)
        if isinstance(work, PlannedFile):
            return functools.partial(self.start_file, work.version, work.source)
        return work

    def start_file(self, version: ObjectVersion, source: str) -> None:
        """Have all of this file fetched without a reader. Does disk I/O. A file that can't be opened is logged."""
        try:
            object_fetch = self._fetches.acquire(version, source)
        except FusecacheError as error:
            _log.warning("%s is not fetched ahead: %s", version.key, error)
            return
        with self._lock:
            object_fetch.want_whole()
            object_fetch.set_prefetch_mask(None)
            self._dispatcher.add_whole_file_locked(object_fetch)
            self._gate.request_inspection_locked(object_fetch)
            is_servable = object_fetch.stored.is_servable
        if is_servable:
            self._events.object_completed.publish(version)
        self._fetches.release(object_fetch)
