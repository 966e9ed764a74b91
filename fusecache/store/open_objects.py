"""Which object versions this process has open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fusecache.errors import StoreError
from fusecache.locking import OwnedLock
from fusecache.store.object import StoredObject
from fusecache.types import ObjectId, ObjectVersion


class OpenObjects:
    """The open objects of the store in `directory`, one per version, and how often each is open. Thread-safe.

    A retired object stays open for those who have it, but the next open of its version makes another one.

    `_lock` guards the table, and comes after the lock of an object that is in it. It is held across the opening of two
    files, and across no other I/O.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = OwnedLock()
        self._objects: dict[ObjectId, StoredObject] = {}
        self._open_counts: dict[StoredObject, int] = {}
        self._is_closed = False

    def open(
        self, version: ObjectVersion, make_object: Callable[[ObjectVersion], StoredObject]
    ) -> StoredObject:
        """The object of this version, opened once more; `make_object` makes it if nobody has it open. Raises StoreError
        after `close`."""
        with self._lock:
            if self._is_closed:
                raise StoreError(f"cache directory {self._directory} was closed")
            stored = self._objects.get(version.id)
            if stored is None or stored.is_retired:
                stored = self._objects[version.id] = make_object(version)
            self._open_counts[stored] = self._open_counts.get(stored, 0) + 1
            return stored

    def release(self, stored: StoredObject) -> bool:
        """Drop one open; True: that was the last, what was verified is remembered, and the caller closes the files."""
        with self._lock:
            count = self._open_counts[stored] - 1
            if count > 0:
                self._open_counts[stored] = count
                return False
            del self._open_counts[stored]
            if self._objects.get(stored.version.id) is stored:
                # before the version can be opened anew, which would hash it once more
                stored.files.remember_verified_blocks()
                del self._objects[stored.version.id]
            return True

    def is_open(self, object_id: ObjectId) -> bool:
        """Whether this process has the object open. Takes no lock."""
        return object_id in self._objects

    def get(self, object_id: ObjectId) -> StoredObject | None:
        """The open object. Takes the lock, so that an object which is not open has been remembered."""
        with self._lock:
            return self._objects.get(object_id)

    def snapshot(self) -> dict[ObjectId, tuple[StoredObject, int]]:
        """All open objects, and how often each is open."""
        with self._lock:
            return {
                object_id: (stored, self._open_counts[stored]) for object_id, stored in self._objects.items()
            }

    def close(self) -> bool:
        """Retire all open objects, and open none any more; False: it was closed before."""
        with self._lock:
            if self._is_closed:
                return False
            self._is_closed = True
            for stored in self._objects.values():
                stored.files.retire()
            return True
