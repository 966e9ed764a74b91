"""Reconciles what the store knows of its objects with the files in the cache directory.

A walk adopts objects that the table does not know, forgets those without files, removes what a crash left behind, and
gives back space that was written but never marked. Data files are not opened, but those with bytes to give back.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from fusecache.store.disk import files as fs
from fusecache.store.disk.directory import CacheDirectory
from fusecache.store.health import DiskHealth
from fusecache.store.open_objects import OpenObjects
from fusecache.store.records import ObjectTable, record_from_summary
from fusecache.types import ObjectId

SCAN_TIMEOUT = 10.0
"""Seconds that questions about all objects wait for the index to be read, and Store.close for the scan to end."""
_OBJECT_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class ScanProgress:
    """How far the store's thread is: events that are set once and stay set."""

    index_loaded: threading.Event = field(default_factory=threading.Event)
    """The table holds what the index knew, or the index is lost."""
    scan_finished: threading.Event = field(default_factory=threading.Event)
    """The first walk over all files has ended, and the ledger can be relied on."""
    stop_requested: threading.Event = field(default_factory=threading.Event)
    """The store is being closed: a walk ends at the next object."""


class FolderScan:
    """Walks over the folders of one cache directory. Thread-safe; blocks for disk I/O, and a disk that fails ends a
    walk without an error.

    A walk over everything is followed by walks over the folders whose mtime has changed, which is how objects that
    other processes made or evicted become known, and there over objects that are not known to be complete: eviction
    reads a header again before it unlinks.
    """

    def __init__(
        self,
        *,
        cache_directory: CacheDirectory,
        health: DiskHealth,
        object_table: ObjectTable,
        open_objects: OpenObjects,
        progress: ScanProgress,
    ) -> None:
        self.progress = progress
        self._cache_directory = cache_directory
        self._health = health
        self._object_table = object_table
        self._open_objects = open_objects
        self._walk_lock = threading.Lock()
        """Held during a walk; guards the mtimes."""
        self._folder_mtimes: dict[str, int] = {}

    def scan_folders(self, *, everything: bool = False) -> int | None:
        """Walk over what is new in the folders that have changed, or over everything. Returns the bytes stored in the
        objects that were looked at; None: the walk was cut short."""
        total = 0
        with self._walk_lock:
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
            if self.progress.stop_requested.is_set():
                return None
            if _OBJECT_ID.fullmatch(text):
                is_pair = f"{text}.data" in names and f"{text}.blocks" in names and f"{text}.new" not in names
                record = None if free_uncommitted or not is_pair else self._object_table.get(ObjectId(text))
                if record is not None and record.is_complete:
                    continue
                total += self._scan_object(ObjectId(text), is_pair, free_uncommitted)
        self._forget_objects(known - ids)
        return total

    def _scan_object(self, object_id: ObjectId, is_pair: bool, free_uncommitted: bool) -> int:
        """Take over what the files of one object say; returns the bytes stored."""
        self._object_table.watch_object(object_id)
        try:
            summary = fs.read_summary(self._cache_directory, object_id) if is_pair else None
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
        if not self._open_objects.is_open(object_id):
            self._object_table.put_if_unchanged(object_id, record_from_summary(summary))
        return summary.stored_bytes

    def _forget_objects(self, object_ids: Iterable[ObjectId]) -> None:
        for object_id in object_ids:
            if not self._open_objects.is_open(object_id):
                self._object_table.forget_object(object_id)

    def _remove_crash_leftovers(self, object_id: str) -> None:
        """Remove what a crash left: half a pair, or a file that is broken. Creation holds the same lock."""
        with self._cache_directory.exclusive_lock() as is_locked:
            if not is_locked:
                return
            self._cache_directory.blocks_path(object_id).with_suffix(".new").unlink(missing_ok=True)
            if (
                fs.read_summary(self._cache_directory, object_id) is None
                or not self._cache_directory.data_path(object_id).exists()
            ):
                fs.unlink_object_if_unused(self._cache_directory, object_id)
