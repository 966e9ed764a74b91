"""The store's one thread: it reads the index, walks over the files behind the running store, recounts the ledger, and
keeps the index.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace

from fusecache.store.disk.directory import CacheDirectory
from fusecache.store.disk.ledger import Ledger
from fusecache.store.folder_scan import FolderScan
from fusecache.store.health import DiskHealth
from fusecache.store.index import ObjectIndex
from fusecache.store.records import ObjectTable
from fusecache.store.space import Space

_log = logging.getLogger(__name__)

FLUSH_INTERVAL = 5.0
"""Seconds between two flushes of the index and walks over the folders."""

_ORDER_INTERVAL = 60.0
"""Seconds between two saves of the whole order of eviction, which only a crash loses."""


class Scanner:
    """Runs in a thread from `start` to `stop`, and sets the events of the walk's ScanProgress on its way. All that it
    holds itself is used by that thread only.

    | State | Ends with |
    |---|---|
    | reads the index | `index_loaded` is set |
    | walks over everything, and recounts the ledger | `scan_finished` is set |
    | every 5 s: flushes the index, walks over what has changed, and evicts what is over the limits | `stop_requested` |
    | flushes the index and the order of eviction | the thread ends |
    """

    def __init__(
        self,
        *,
        cache_directory: CacheDirectory,
        ledger: Ledger,
        health: DiskHealth,
        object_table: ObjectTable,
        folder_scan: FolderScan,
        space: Space,
    ) -> None:
        self._cache_directory = cache_directory
        self._ledger = ledger
        self._health = health
        self._object_table = object_table
        self._folder_scan = folder_scan
        self._progress = folder_scan.progress
        self._space = space
        self._is_order_unsaved = False
        self._order_saved_at = 0.0
        self._thread = threading.Thread(target=self._run, name="fusecache-store", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Flush the index and end; waits at most `timeout` seconds."""
        self._progress.stop_requested.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        index = ObjectIndex(self._cache_directory.index_path)
        try:
            self._object_table.load_records(*index.load_records())
            self._progress.index_loaded.set()
            try:
                self._recount_ledger()
            finally:
                self._progress.scan_finished.set()
            self._space.enforce_limits()
            while not self._progress.stop_requested.wait(FLUSH_INTERVAL):
                self._flush_index(index)
                # what a process that died was writing is found by a walk over everything only
                if self._ledger.is_counted and not self._void_dead_reservations():
                    self._folder_scan.scan_folders()
                else:
                    self._recount_ledger()
                self._space.enforce_limits()
            self._flush_index(index, with_order=True)
        except Exception:
            _log.exception("cache directory %s: the background scan ended", self._cache_directory.path)
        finally:
            self._progress.index_loaded.set()
            index.close()

    def _void_dead_reservations(self) -> bool:
        try:
            return self._ledger.void_dead_reservations()
        except OSError as error:
            self._health.report_failure(error)
            return False

    def _flush_index(self, index: ObjectIndex, *, with_order: bool = False) -> None:
        changed, dropped = self._object_table.pop_changes()
        if changed or dropped:
            placed = []
            for object_id, record in changed:
                uses, main = self._object_table.eviction_place(object_id)
                placed.append((object_id, replace(record, accesses=uses, is_in_main=main)))
            index.save_changes(placed, dropped)
            self._is_order_unsaved = True
        now = time.monotonic()
        if self._is_order_unsaved and (with_order or now >= self._order_saved_at + _ORDER_INTERVAL):
            index.save_order(*self._object_table.eviction_order())
            self._is_order_unsaved, self._order_saved_at = False, now

    def _recount_ledger(self) -> None:
        try:
            with self._cache_directory.exclusive_lock() as is_locked:
                before = self._ledger.start_recount() if is_locked else None
            counted: int | None = None
            try:
                counted = self._folder_scan.scan_folders(everything=True)
            finally:
                if before is not None:
                    with self._cache_directory.exclusive_lock() as is_locked:
                        change = self._ledger.finish_recount(before, counted if is_locked else None)
                    if change:
                        _log.info(
                            "cache directory %s: recounted, off by %d bytes",
                            self._cache_directory.path,
                            change,
                        )
        except OSError as error:
            self._health.report_failure(error)
