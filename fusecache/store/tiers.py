"""A store on the disk and one in memory that look like one: which of them an object is in is decided when it is opened.

Whoever opens a version while somebody has it open gets the same StoredObject. Otherwise `_in_memory` decides, by the
rules of paths.py. A version may be in both stores: it was whole on a slow disk, or was begun under other settings.

Lock order: `_lock` before the stores'; held across the opening of files, as a store's own lock is.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from pathlib import Path

from fusecache.errors import StoreError
from fusecache.store import probe, tier_placement
from fusecache.store.info import ObjectInfo, StoreUsage
from fusecache.store.object import StoredObject
from fusecache.store.store import Store
from fusecache.store.throughput import MEASUREMENT_LIFETIME, BusyThroughput, PeakThroughput
from fusecache.store.tier_placement import MeasuredRates, TierCandidate
from fusecache.types import ObjectId, ObjectVersion

_log = logging.getLogger(__name__)

_MEASURE_TIMEOUT = 10.0
"""Seconds to wait for a measurement."""


class ThroughputMeter:
    """Measures what `store=auto` goes by: the disk below `directory`, now and then, in a thread of its own; and what is
    written to both stores. Thread-safe. `floor`: bytes that a measurement leaves free there."""

    def __init__(
        self,
        directory: Path,
        free_floor: int,
        measure_rates: Callable[[Path], tuple[float, float] | None] = probe.measure_disk_rates,
    ) -> None:
        self._directory = directory
        self._free_floor = free_floor
        self._measure_rates = measure_rates
        self._lock = threading.Lock()
        self._network_peak = PeakThroughput()
        self._disk_writes = BusyThroughput()
        self._disk_rates: tuple[float, float] | None = None
        self._measure_at = 0.0
        self._thread: threading.Thread | None = None

    @contextmanager
    def observe_disk_write(self, length: int) -> Iterator[None]:
        """So many bytes are written to the disk while this is entered."""
        with self._lock:
            self._disk_writes.begin_call(time.monotonic())
        try:
            yield
        finally:
            now = time.monotonic()
            with self._lock:
                self._disk_writes.end_call(now, length)
                self._network_peak.add_arrival(now, length)

    @contextmanager
    def observe_memory_write(self, length: int) -> Iterator[None]:
        """So many bytes are written to memory."""
        yield
        with self._lock:
            self._network_peak.add_arrival(time.monotonic(), length)

    def measured_rates(self) -> MeasuredRates:
        """What is known now."""
        now = time.monotonic()
        with self._lock:
            if now >= self._measure_at and (self._thread is None or not self._thread.is_alive()):
                self._measure_at = now + MEASUREMENT_LIFETIME
                self._thread = threading.Thread(target=self._measure_disk, name="disk-pace", daemon=True)
                self._thread.start()
            write, read = self._disk_rates or (None, None)
            known = [pace for pace in (write, self._disk_writes.bytes_per_second(now)) if pace is not None]
            return MeasuredRates(min(known, default=None), read, self._network_peak.bytes_per_second(now))

    def _measure_disk(self) -> None:
        try:
            found = os.statvfs(self._directory)
            measured = None
            if found.f_bavail * found.f_frsize > self._free_floor + probe.MAX_WRITTEN_BYTES:
                measured = self._measure_rates(self._directory)
        except OSError as error:
            _log.info("the pace of %s is not known: %s", self._directory, error.strerror)
            return
        if measured is not None:
            write, read = (pace / 2**20 for pace in measured)
            _log.info("%s: writes %.0f MiB/s, reads %.0f MiB/s", self._directory, write, read)
        with self._lock:
            self._disk_rates = measured

    def wait_for_measurement(self) -> None:
        """Wait for a measurement that is under way, some seconds at most."""
        thread = self._thread
        if thread is not None:
            thread.join(_MEASURE_TIMEOUT)

    def close(self) -> None:
        """Leave no measurement under way."""
        self.wait_for_measurement()


class TieredStore:
    """See BlockStore. `small_size` (bytes): larger objects are kept in memory; or with a `meter`: what the disk is too
    slow for. Who made the stores and the meter closes them."""

    def __init__(
        self, disk: Store, memory: Store, *, small_size: int = 0, meter: ThroughputMeter | None = None
    ) -> None:
        self.estimate_peer_throughput: Callable[[ObjectVersion], float | None] | None = None
        """See BlockStore."""
        self._disk_store = disk
        self._memory_store = memory
        self._stores = (memory, disk)
        self._small_size = small_size
        self._meter = meter
        self._lock = threading.Lock()
        if meter is not None:
            disk.observe_writes(meter.observe_disk_write)
            memory.observe_writes(meter.observe_memory_write)
            meter.measured_rates()  # begins to measure

    @property
    def directories(self) -> Sequence[Path]:
        """See BlockStore."""
        return (self._disk_store.directory, self._memory_store.directory)

    @property
    def block_size(self) -> int:
        """See BlockStore."""
        return self._disk_store.block_size

    @property
    def is_spare(self) -> Callable[[ObjectId], bool] | None:
        """See Store."""
        return self._disk_store.is_spare

    @is_spare.setter
    def is_spare(self, spare: Callable[[ObjectId], bool] | None) -> None:
        self._disk_store.is_spare = self._memory_store.is_spare = spare

    # -- opening

    def open(self, version: ObjectVersion) -> StoredObject:
        """See BlockStore."""
        with self._lock:
            return self._choose_store_locked(version).open(version)

    def has_whole(self, version: ObjectVersion) -> bool:
        """See BlockStore."""
        return any(store.has_whole(version) for store in self._stores)

    def open_in_place(self, version: ObjectVersion) -> AbstractContextManager[StoredObject]:
        """See BlockStore."""
        with self._lock:
            return self._choose_store_locked(version, may_move=False).open_in_place(version)

    def _choose_store_locked(self, version: ObjectVersion, *, may_move: bool = True) -> Store:
        """Where to open it: where it is open; or by the rules, unless something is there and it does not move."""
        for store in self._stores:
            if store.is_open(version.id):
                return store
        found = self._describe_candidate(version)
        if not may_move and (found.disk_bytes or found.memory_bytes):
            in_memory = found.memory_bytes >= found.disk_bytes
        else:
            in_memory = self._belongs_in_memory(found)
        return self._memory_store if in_memory else self._disk_store

    def measured_rates(self, *, wait_for_measurement: bool = False) -> MeasuredRates:
        """See BlockStore."""
        if self._meter is None:
            return MeasuredRates()
        found = self._meter.measured_rates()
        if wait_for_measurement:
            self._meter.wait_for_measurement()
            found = self._meter.measured_rates()
        return found

    def _describe_candidate(self, version: ObjectVersion) -> TierCandidate:
        def elsewhere() -> float | None:
            return None if self.estimate_peer_throughput is None else self.estimate_peer_throughput(version)

        return TierCandidate(
            version.size,
            self._disk_store.present_bytes(version.id),
            self._memory_store.present_bytes(version.id),
            fits_in_memory=lambda: (
                self._memory_store.recently_used_bytes(time.time() - MEASUREMENT_LIFETIME) + version.size
                <= self._memory_store.limit
            ),
            estimate_peer_throughput=elsewhere,
            is_in_page_cache=lambda: self._is_in_page_cache(version),
        )

    def _is_in_page_cache(self, version: ObjectVersion) -> bool:
        try:
            with self._disk_store.open_in_place(version) as stored:
                return probe.is_in_page_cache(stored.fileno(), version.size)
        except (StoreError, OSError):
            return True

    def _belongs_in_memory(self, candidate: TierCandidate) -> bool:
        if self._meter is None:
            return tier_placement.small_belongs_in_memory(candidate, self._small_size)
        return tier_placement.auto_belongs_in_memory(candidate, self._meter.measured_rates())

    # -- both of them

    def usage(self) -> StoreUsage:
        """See BlockStore."""
        memory, disk = (store.usage() for store in self._stores)
        both = {field.name: getattr(memory, field.name) + getattr(disk, field.name) for field in fields(disk)}
        return StoreUsage(**{**both, "sick": memory.sick or disk.sick})

    def objects(self) -> list[ObjectInfo]:
        """See BlockStore."""
        found: dict[ObjectId, ObjectInfo] = {}
        for store in self._stores:
            for info in store.objects():
                known = found.get(info.id)
                if known is None or known.present_bytes < info.present_bytes:
                    found[info.id] = info
        return list(found.values())

    def version_of(self, object_id: ObjectId) -> ObjectVersion | None:
        """See BlockStore."""
        return self._memory_store.version_of(object_id) or self._disk_store.version_of(object_id)

    def evict(self, object_id: ObjectId) -> int:
        """See BlockStore."""
        return sum(store.evict(object_id) for store in self._stores)

    def set_pinned(self, object_id: ObjectId, is_pinned: bool) -> None:
        """See BlockStore."""
        for store in self._stores:
            if store.present_bytes(object_id):
                store.set_pinned(object_id, is_pinned)
                return
        self._disk_store.set_pinned(object_id, is_pinned)
