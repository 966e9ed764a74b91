"""The store's one thread: it reads the index, walks over the files behind the running store, and keeps the
index.

The walk adopts objects that the index does not know, forgets those without files, removes what a crash left
behind, gives back what was written but never marked, and recounts the ledger. Later rounds look only into
directories whose mtime changed, which is how objects that other processes made or evicted become known, and there
at what is not known to be complete: eviction looks again before it unlinks. Data files are not opened, but those
with bytes to give back.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from fusecache.store.disk import files as fs
from fusecache.store.disk.files import CacheDirectory
from fusecache.store.disk.ledger import Ledger
from fusecache.store.health import DiskHealth
from fusecache.store.index import ObjectIndex
from fusecache.store.records import ObjectTable, record_from_summary
from fusecache.types import ObjectId

_log = logging.getLogger(__name__)

FLUSH_INTERVAL = 5.0
"""Seconds between two flushes of the index and looks at the directories."""

_ORDER_INTERVAL = 60.0
"""Seconds between two saves of the whole order of eviction, which only a crash loses."""
_OBJECT_ID = re.compile(r"[0-9a-f]{32}")


class Scanner:
    """Runs in a thread from `start` to `stop`. `busy(id)` says whether this process has an object open,
    `keep()` evicts what is over the bounds.

    `loaded` is set when the index was read, `scanned` after the
    walk.
    """

    def __init__(
        self,
        cache_directory: CacheDirectory,
        ledger: Ledger,
        health: DiskHealth,
        object_table: ObjectTable,
        is_open: Callable[[ObjectId], bool],
        enforce_limits: Callable[[], None],
    ) -> None:
        self.index_loaded = threading.Event()
        self.scan_finished = threading.Event()
        self._cache_directory = cache_directory
        self._ledger = ledger
        self._health = health
        self._object_table = object_table
        self._is_open = is_open
        self._enforce_limits = enforce_limits
        self._folder_mtimes: dict[str, int] = {}
        self._refresh_lock = threading.Lock()
        self._stop_requested = threading.Event()
        self._is_order_unsaved = False
        self._order_saved_at = 0.0
        self._thread = threading.Thread(target=self._run, name="fusecache-store", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Flush the index and end; waits at most `timeout` seconds."""
        self._stop_requested.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        index = ObjectIndex(self._cache_directory.index_path)
        try:
            self._object_table.load_records(*index.load_records())
            self.index_loaded.set()
            try:
                self._recount_ledger()
            finally:
                self.scan_finished.set()
            self._enforce_limits()
            while not self._stop_requested.wait(FLUSH_INTERVAL):
                self._flush_index(index)
                # what a process that died was writing is found by a walk over everything only
                if self._ledger.is_counted and not self._void_dead_reservations():
                    self.scan_folders()
                else:
                    self._recount_ledger()
                self._enforce_limits()
            self._flush_index(index, with_order=True)
        except Exception:
            _log.exception("cache directory %s: the background scan ended", self._cache_directory.path)
        finally:
            self.index_loaded.set()
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
            with self._cache_directory.exclusive_lock() as locked:
                before = self._ledger.start_recount() if locked else None
            counted: int | None = None
            try:
                counted = self.scan_folders(everything=True)
            finally:
                if before is not None:
                    with self._cache_directory.exclusive_lock() as locked:
                        change = self._ledger.finish_recount(before, counted if locked else None)
                    if change:
                        _log.info(
                            "cache directory %s: recounted, off by %d bytes",
                            self._cache_directory.path,
                            change,
                        )
        except OSError as error:
            self._health.report_failure(error)

    def scan_folders(self, *, everything: bool = False) -> int | None:
        """Look at what is new in the directories that changed, or at everything; returns the bytes stored in what was
        looked at, None if it was cut short."""
        total = 0
        with self._refresh_lock:
            seen: set[str] = set()
            known: dict[str, set[ObjectId]] = {}
            for object_id, _ in self._object_table.snapshot():
                known.setdefault(object_id[:2], set()).add(object_id)
            try:
                with os.scandir(self._cache_directory.data_root) as entries:
                    folders = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
                for entry in folders:
                    seen.add(entry.name)
                    mtime = os.stat(entry.path).st_mtime_ns
                    if everything or self._folder_mtimes.get(entry.name) != mtime:
                        part = self._scan_folder(
                            entry.name, known.get(entry.name, set()), free_uncommitted=everything
                        )
                        if part is None:
                            return None
                        self._folder_mtimes[entry.name] = mtime
                        total += part
            except OSError as error:
                self._health.report_failure(error)
                return None
            for name in known.keys() - seen:
                self._forget_objects(known[name])
        return total

    def _scan_folder(self, name: str, known: set[ObjectId], *, free_uncommitted: bool) -> int | None:
        names = set(os.listdir(self._cache_directory.data_root / name))
        ids = {x.partition(".")[0] for x in names}
        total = 0
        for text in sorted(ids):
            if self._stop_requested.is_set():
                return None
            if _OBJECT_ID.fullmatch(text):
                whole = f"{text}.data" in names and f"{text}.blocks" in names and f"{text}.new" not in names
                record = None if free_uncommitted or not whole else self._object_table.get(ObjectId(text))
                if record is not None and record.is_complete:
                    continue
                total += self._scan_object(ObjectId(text), whole, free_uncommitted)
        self._forget_objects(known - ids)
        return total

    def _scan_object(self, object_id: ObjectId, has_both_files: bool, free_uncommitted: bool) -> int:
        """Take over what the files say; returns the bytes stored."""
        self._object_table.watch_object(object_id)
        try:
            summary = fs.read_summary(self._cache_directory, object_id) if has_both_files else None
            if summary is None:
                self._remove_crash_leftovers(object_id)
                summary = fs.read_summary(self._cache_directory, object_id)
            if (
                free_uncommitted
                and summary is not None
                and fs.may_have_uncommitted_space(self._cache_directory, summary)
            ):
                fs.free_uncommitted_space(self._cache_directory, object_id)
        except FileNotFoundError:
            return 0  # evicted meanwhile
        except OSError as error:
            self._health.report_failure(error)
            return 0
        if summary is None:
            self._forget_objects((object_id,))
            return 0
        if not self._is_open(object_id):
            self._object_table.put_if_unchanged(object_id, record_from_summary(summary))
        return summary.stored_bytes

    def _forget_objects(self, object_ids: Iterable[ObjectId]) -> None:
        for object_id in object_ids:
            if not self._is_open(object_id):
                self._object_table.forget_object(object_id)

    def _remove_crash_leftovers(self, object_id: str) -> None:
        """Remove what a crash left: half a pair, or a file that is broken. Creation holds the same lock."""
        with self._cache_directory.exclusive_lock() as locked:
            if not locked:
                return
            self._cache_directory.blocks_path(object_id).with_suffix(".new").unlink(missing_ok=True)
            if (
                fs.read_summary(self._cache_directory, object_id) is None
                or not self._cache_directory.data_path(object_id).exists()
            ):
                fs.unlink_object_if_unused(self._cache_directory, object_id)
