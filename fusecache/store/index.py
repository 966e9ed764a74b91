"""The index of object versions: a mirror of the files for a fast start, in diskcache (SQLite) without pickle.

Only the store's thread uses it, so that no reader waits for SQLite. It may be lost or broken at any time: everything
but the order of eviction is in the files too.
"""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diskcache

from fusecache.store.records import ObjectRecord
from fusecache.types import ObjectId, ObjectVersion

_log = logging.getLogger(__name__)

_ORDER_KEY = "#order"
_MODE_RAW = 1
_ERRORS = (diskcache.Timeout, sqlite3.Error, OSError, ValueError)


class JsonDisk(diskcache.Disk):  # type: ignore[misc]
    """Keys are text, values are JSON text in the row itself. Anything else in the database is refused:
    diskcache's own formats include pickle, which runs code that it finds in the cache directory."""

    def put(self, key: Any) -> tuple[str, bool]:
        """Database form of a key."""
        if not isinstance(key, str):
            raise ValueError("index keys are text")
        return key, True

    def get(self, key: Any, raw: bool) -> str:
        """Key from its database form."""
        if not raw or not isinstance(key, str):
            raise ValueError("index key is not text")
        return key

    def store(self, value: Any, read: bool, key: Any = None) -> tuple[int, int, None, str]:
        """Database form of a value."""
        return 0, _MODE_RAW, None, json.dumps(value, separators=(",", ":"))

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        """Value from its database form."""
        if mode != _MODE_RAW or filename is not None or not isinstance(value, str):
            raise ValueError("index value is not JSON")
        return json.loads(value)


def record_to_json(record: ObjectRecord) -> dict[str, Any]:
    """The index's value of an object id."""
    return asdict(record)


def record_from_json(value: Any) -> ObjectRecord | None:
    """Reverse of `record_to_json`; None for anything else."""
    try:
        version = ObjectVersion(**value["version"])
        record = ObjectRecord(**{**value, "version": version})
    except (TypeError, KeyError):
        return None
    texts = (version.origin, version.key, version.etag)
    numbers = (
        version.size,
        version.mtime_ns,
        record.block_size,
        record.present_bytes,
        record.stored_bytes,
        record.last_use_ns,
        record.accesses,
        record.attestation_state,
    )
    flags = (record.is_pinned, record.is_in_main)
    typed = ((str, texts), (int, numbers), (bool, flags))
    return record if all(type(x) is kind for kind, values in typed for x in values) else None


class ObjectIndex:
    """The index below `directory`, for one thread. It fails soft: the first failure is logged, none is raised; a broken
    index is made anew, empty. Every method may block for the disk."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._cache: Any = None
        self._has_failed = False
        for attempt in range(2):
            try:
                self._cache = self._open_cache()
                return
            except _ERRORS as error:
                if attempt == 0 and isinstance(error, sqlite3.DatabaseError | ValueError):
                    _log.warning("cache index %s is broken and made anew from the files", directory)
                    shutil.rmtree(directory, ignore_errors=True)
                else:
                    self._report_failure(error)
                    return

    def _open_cache(self) -> Any:
        # no culling: eviction is the store's; no memory map and a small page cache: one thread, seldom
        cache = diskcache.Cache(
            str(self._directory),
            timeout=5,
            disk=JsonDisk,
            eviction_policy="none",
            cull_limit=0,
            size_limit=1 << 50,
            sqlite_mmap_size=0,
            sqlite_cache_size=512,
        )
        cache.get("")  # a damaged file shows at the first query
        return cache

    def _report_failure(self, error: BaseException) -> None:
        if not self._has_failed:
            self._has_failed = True
            _log.warning("cache index %s: %s; the store goes on without it", self._directory, error)

    def load_records(self) -> tuple[list[tuple[ObjectId, ObjectRecord]], list[tuple[ObjectId, int]]]:
        """All records in their order of eviction, and the ghosts (id, size in bytes); nothing if it can't be read."""
        records: dict[ObjectId, ObjectRecord] = {}
        try:
            if self._cache is None:
                return [], []
            order = self._cache.get(_ORDER_KEY) or {}
            for key in list(self._cache):
                record = record_from_json(self._cache.get(key)) if key != _ORDER_KEY else None
                if record is not None and record.version.id == key:
                    records[ObjectId(key)] = record
            known = [ObjectId(x) for x in order.get("ids", ()) if x in records]
            rank = {object_id: i for i, object_id in enumerate(known)}
            listed = sorted(records.items(), key=lambda x: (rank.get(x[0], len(rank)), x[1].last_use_ns))
            ghosts = [(ObjectId(str(x)), int(size)) for x, size in order.get("ghosts", ())]
            return listed, ghosts
        except (*_ERRORS, AttributeError, TypeError) as error:
            self._report_failure(error)
            return list(records.items()), []

    def save_changes(
        self, changed: Iterable[tuple[ObjectId, ObjectRecord]], dropped_ids: Iterable[ObjectId]
    ) -> None:
        """Write changed records and drop others, in one transaction."""
        try:
            if self._cache is None:
                return
            with self._cache.transact():
                for object_id, record in changed:
                    self._cache.set(object_id, record_to_json(record))
                for object_id in dropped_ids:
                    self._cache.delete(object_id)
        except _ERRORS as error:
            self._report_failure(error)

    def save_order(self, ids: list[ObjectId], ghosts: list[tuple[ObjectId, int]]) -> None:
        """Write the order of eviction, and the ghosts (id and size in bytes)."""
        try:
            if self._cache is not None:
                self._cache.set(_ORDER_KEY, {"ids": ids, "ghosts": ghosts})
        except _ERRORS as error:
            self._report_failure(error)

    def close(self) -> None:
        """Close this thread's connection."""
        if self._cache is not None:
            self._cache.close()
