"""Makes room in the store: evicts objects in the order of the policy, or one that a person names."""

from __future__ import annotations

import threading
from collections.abc import Callable

from fusecache.store.context import VerifiedBlocks
from fusecache.store.disk import files as fs
from fusecache.store.disk.directory import CacheDirectory
from fusecache.store.disk.files import BlocksFileSummary
from fusecache.store.disk.ledger import Ledger
from fusecache.store.folder_scan import SCAN_TIMEOUT, FolderScan
from fusecache.store.open_objects import OpenObjects
from fusecache.store.records import ObjectTable, record_from_summary
from fusecache.types import ObjectId, ObjectVersion


class Evictor:
    """Evicts objects of one cache directory. `is_spare(version)` says that another node keeps a copy of a version for
    longer than this one: such objects go first. It is called often, from any thread, and has to be quick.

    An object is not evicted while it is pinned, while any process has it open, or if another process has used it since
    this one knew of it. Thread-safe; every method may block for disk I/O and raises OSError where the disk fails.
    """

    def __init__(
        self,
        *,
        cache_directory: CacheDirectory,
        ledger: Ledger,
        object_table: ObjectTable,
        open_objects: OpenObjects,
        verified_blocks: VerifiedBlocks,
        folder_scan: FolderScan,
        is_spare: Callable[[ObjectVersion], bool] | None,
    ) -> None:
        self.eviction_count = 0
        """Objects evicted since this process opened the store."""
        self._cache_directory = cache_directory
        self._ledger = ledger
        self._object_table = object_table
        self._open_objects = open_objects
        self._verified_blocks = verified_blocks
        self._folder_scan = folder_scan
        self._is_spare = is_spare
        self._count_lock = threading.Lock()

    def make_room(self, nbytes: int, accepts_less: bool) -> int:
        """Evict objects of at least `nbytes`, as the policy says; returns the bytes freed. If so much can't be freed:
        with `accepts_less` as much as can be, otherwise nothing is evicted and the answer is 0. One thread at a time
        calls this: Space has a lock for it."""
        self._folder_scan.progress.index_loaded.wait(SCAN_TIMEOUT)
        if not self._object_table.can_free(nbytes, self._is_evictable):
            self._folder_scan.scan_folders()
            if not self._object_table.can_free(nbytes, self._is_evictable) and not accepts_less:
                return 0
        freed = 0
        rounds = (
            (self._is_evictable,)
            if self._is_spare is None
            else (self._is_spare_and_evictable, self._is_evictable)
        )
        for is_evictable in rounds:
            for object_id in self._object_table.victims(is_evictable):
                freed += self.evict_object(object_id, is_forced=False)
                if freed >= nbytes:
                    return freed
        return freed

    def _is_spare_and_evictable(self, object_id: ObjectId) -> bool:
        record = self._object_table.get(object_id)
        return (
            record is not None
            and self._is_spare is not None
            and self._is_spare(record.version)
            and self._is_evictable(object_id)
        )

    def _is_evictable(self, object_id: ObjectId) -> bool:
        record = self._object_table.get(object_id)
        return record is not None and not record.is_pinned and not self._open_objects.is_open(object_id)

    def evict_object(self, object_id: ObjectId, *, is_forced: bool) -> int:
        """Evict one object; returns the bytes freed. 0: it is pinned, in use, or (unless `is_forced`) another process
        has used it since this one knew of it."""
        with self._cache_directory.exclusive_lock() as is_locked:
            if not is_locked:
                return 0
            summary = fs.read_summary(self._cache_directory, object_id)
            if summary is not None and (
                summary.state.is_pinned or not (is_forced or self._is_record_current(summary))
            ):
                self._object_table.put_record(object_id, record_from_summary(summary))
                return 0
            if self._open_objects.is_open(object_id) or not fs.unlink_object_if_unused(
                self._cache_directory, object_id
            ):
                return 0
            stored = summary.stored_bytes if summary is not None else 0
            self._ledger.count_evicted(stored)
        self._object_table.forget_object(object_id, was_evicted=not is_forced)
        self._verified_blocks.entries.pop(object_id, None)
        if stored:
            with self._count_lock:
                self.eviction_count += 1
        return stored

    def _is_record_current(self, summary: BlocksFileSummary) -> bool:
        record = self._object_table.get(summary.version.id)
        return record is None or summary.state.last_use_ns <= record.last_use_ns
