"""Blocks that were found bad: counted, and one line in the log per object."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from fusecache.store.records import ObjectTable
from fusecache.types import ObjectId, ObjectVersion

_log = logging.getLogger(__name__)


class CorruptionLog:
    """Counts the damaged blocks of the store in `directory`. Thread-safe."""

    def __init__(self, directory: Path, object_table: ObjectTable) -> None:
        self.corrupt_block_count = 0
        """Blocks found bad since this process opened the store."""
        self._directory = directory
        self._object_table = object_table
        self._lock = threading.Lock()
        self._logged_ids: set[ObjectId] = set()

    def report_bad_block(self, version: ObjectVersion, block: int, *, is_cleared: bool) -> None:
        """Count a bad block. Unless it `is_cleared`, the files were unlinked, and the table forgets the object."""
        with self._lock:
            self.corrupt_block_count += 1
            is_first = version.id not in self._logged_ids
            self._logged_ids.add(version.id)
        if not is_cleared:
            self._object_table.forget_object(version.id)
        if is_first:
            _log.warning(
                "%s: block %d in the cache is damaged and is fetched again; check the disk of %s",
                version.key,
                block,
                self._directory,
            )
