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
from fusecache.store import paths, probe
from fusecache.store.info import ObjectInfo, StoreUsage
from fusecache.store.object import StoredObject
from fusecache.store.pace import LASTING, Best, Busy
from fusecache.store.paths import Found, Paces
from fusecache.store.store import Store
from fusecache.types import ObjectId, ObjectVersion

_log = logging.getLogger(__name__)

_PROBE = 10.0
"""Seconds to wait for a measurement."""


class Meter:
    """Measures what `store=auto` goes by: the disk below `directory`, now and then, in a thread of its own; and what is
    written to both stores. Thread-safe. `floor`: bytes that a measurement leaves free there."""

    def __init__(
        self,
        directory: Path,
        floor: int,
        measure: Callable[[Path], tuple[float, float] | None] = probe.measure,
    ) -> None:
        self._directory = directory
        self._floor = floor
        self._measure = measure
        self._lock = threading.Lock()
        self._arriving = Best()
        self._disk = Busy()
        self._measured: tuple[float, float] | None = None
        self._due = 0.0
        self._thread: threading.Thread | None = None

    @contextmanager
    def to_disk(self, length: int) -> Iterator[None]:
        """So many bytes are written to the disk while this is entered."""
        with self._lock:
            self._disk.begin(time.monotonic())
        try:
            yield
        finally:
            now = time.monotonic()
            with self._lock:
                self._disk.end(now, length)
                self._arriving.add(now, length)

    @contextmanager
    def to_memory(self, length: int) -> Iterator[None]:
        """So many bytes are written to memory."""
        yield
        with self._lock:
            self._arriving.add(time.monotonic(), length)

    def paces(self) -> Paces:
        """What is known now."""
        now = time.monotonic()
        with self._lock:
            if now >= self._due and (self._thread is None or not self._thread.is_alive()):
                self._due = now + LASTING
                self._thread = threading.Thread(target=self._look, name="disk-pace", daemon=True)
                self._thread.start()
            write, read = self._measured or (None, None)
            known = [pace for pace in (write, self._disk.per_second(now)) if pace is not None]
            return Paces(min(known, default=None), read, self._arriving.per_second(now))

    def _look(self) -> None:
        try:
            found = os.statvfs(self._directory)
            measured = None
            if found.f_bavail * found.f_frsize > self._floor + probe.MOST:
                measured = self._measure(self._directory)
        except OSError as error:
            _log.info("the pace of %s is not known: %s", self._directory, error.strerror)
            return
        if measured is not None:
            write, read = (pace / 2**20 for pace in measured)
            _log.info("%s: writes %.0f MiB/s, reads %.0f MiB/s", self._directory, write, read)
        with self._lock:
            self._measured = measured

    def wait(self) -> None:
        """Wait for a measurement that is under way, some seconds at most."""
        thread = self._thread
        if thread is not None:
            thread.join(_PROBE)

    def close(self) -> None:
        """Leave no measurement under way."""
        self.wait()


class Tiers:
    """See BlockStore. `small_size` (bytes): larger objects are kept in memory; or with a `meter`: what the disk is too
    slow for. Who made the stores and the meter closes them."""

    def __init__(
        self, disk: Store, memory: Store, *, small_size: int = 0, meter: Meter | None = None
    ) -> None:
        self.elsewhere: Callable[[ObjectVersion], float | None] | None = None
        """See BlockStore."""
        self._disk = disk
        self._memory = memory
        self._both = (memory, disk)
        self._small_size = small_size
        self._meter = meter
        self._lock = threading.Lock()
        if meter is not None:
            disk.watch(meter.to_disk)
            memory.watch(meter.to_memory)
            meter.paces()  # begins to measure

    @property
    def directories(self) -> Sequence[Path]:
        """See BlockStore."""
        return (self._disk.directory, self._memory.directory)

    @property
    def block_size(self) -> int:
        """See BlockStore."""
        return self._disk.block_size

    @property
    def is_spare(self) -> Callable[[ObjectId], bool] | None:
        """See Store."""
        return self._disk.is_spare

    @is_spare.setter
    def is_spare(self, spare: Callable[[ObjectId], bool] | None) -> None:
        self._disk.is_spare = self._memory.is_spare = spare

    # -- opening

    def open(self, version: ObjectVersion) -> StoredObject:
        """See BlockStore."""
        with self._lock:
            return self._place(version).open(version)

    def has_whole(self, version: ObjectVersion) -> bool:
        """See BlockStore."""
        return any(store.has_whole(version) for store in self._both)

    def in_place(self, version: ObjectVersion) -> AbstractContextManager[StoredObject]:
        """See BlockStore."""
        with self._lock:
            return self._place(version, moves=False).in_place(version)

    def _place(self, version: ObjectVersion, *, moves: bool = True) -> Store:
        """Where to open it: where it is open; or by the rules, unless something is there and it does not move."""
        for store in self._both:
            if store.is_open(version.id):
                return store
        found = self._found(version)
        if not moves and (found.on_disk or found.in_memory):
            in_memory = found.in_memory >= found.on_disk
        else:
            in_memory = self._in_memory(found)
        return self._memory if in_memory else self._disk

    def paces(self, *, wait: bool = False) -> Paces:
        """See BlockStore."""
        if self._meter is None:
            return Paces()
        found = self._meter.paces()
        if wait:
            self._meter.wait()
            found = self._meter.paces()
        return found

    def _found(self, version: ObjectVersion) -> Found:
        def elsewhere() -> float | None:
            return None if self.elsewhere is None else self.elsewhere(version)

        return Found(
            version.size,
            self._disk.present_bytes(version.id),
            self._memory.present_bytes(version.id),
            fits=lambda: self._memory.taken(time.time() - LASTING) + version.size <= self._memory.limit,
            elsewhere=elsewhere,
            resident=lambda: self._is_resident(version),
        )

    def _is_resident(self, version: ObjectVersion) -> bool:
        try:
            with self._disk.in_place(version) as stored:
                return probe.is_resident(stored.fileno(), version.size)
        except (StoreError, OSError):
            return True

    def _in_memory(self, found: Found) -> bool:
        if self._meter is None:
            return paths.small_in_memory(found, self._small_size)
        return paths.auto_in_memory(found, self._meter.paces())

    # -- both of them

    def usage(self) -> StoreUsage:
        """See BlockStore."""
        memory, disk = (store.usage() for store in self._both)
        both = {field.name: getattr(memory, field.name) + getattr(disk, field.name) for field in fields(disk)}
        return StoreUsage(**{**both, "sick": memory.sick or disk.sick})

    def objects(self) -> list[ObjectInfo]:
        """See BlockStore."""
        found: dict[ObjectId, ObjectInfo] = {}
        for store in self._both:
            for info in store.objects():
                known = found.get(info.id)
                if known is None or known.present_bytes < info.present_bytes:
                    found[info.id] = info
        return list(found.values())

    def version_of(self, object_id: ObjectId) -> ObjectVersion | None:
        """See BlockStore."""
        return self._memory.version_of(object_id) or self._disk.version_of(object_id)

    def evict(self, object_id: ObjectId) -> int:
        """See BlockStore."""
        return sum(store.evict(object_id) for store in self._both)

    def pin(self, object_id: ObjectId, pinned: bool) -> None:
        """See BlockStore."""
        for store in self._both:
            if store.present_bytes(object_id):
                store.pin(object_id, pinned)
                return
        self._disk.pin(object_id, pinned)
