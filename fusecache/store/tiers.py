"""A store on the disk and one in memory that look like one: which of them an object is in is decided when it is opened.

All who have a version open at the same time share one StoredObject. The first of them decides where it is, by the rules
of tier_placement. A version may be in both stores: it was begun under other settings.

Lock order: TieredStore._lock before the stores'. It makes the choice of a store and the opening there one step, and is
held across the opening of files, as the lock of a store's OpenObjects is.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path

from fusecache.locking import OwnedLock
from fusecache.store import tier_placement
from fusecache.store.info import ObjectInfo, StoreUsage
from fusecache.store.object import StoredObject
from fusecache.store.store import Store
from fusecache.store.tier_placement import TierCandidate
from fusecache.types import ObjectId, ObjectVersion


class TieredStore:
    """A BlockStore over two stores: objects of more than `small_size` bytes are kept in `memory`, the others on `disk`.
    Thread-safe. The caller closes the two stores."""

    def __init__(self, disk: Store, memory: Store, *, small_size: int) -> None:
        self._disk_store = disk
        self._memory_store = memory
        self._stores = (memory, disk)
        self._small_size = small_size
        self._lock = OwnedLock()

    @property
    def directories(self) -> Sequence[Path]:
        """The cache directory on the disk, and the one in memory."""
        return (self._disk_store.directory, self._memory_store.directory)

    @property
    def block_size(self) -> int:
        """Bytes of a block, in both stores."""
        return self._disk_store.block_size

    # -- opening

    def open(self, version: ObjectVersion) -> StoredObject:
        """Open a version where it is open already, or else where the rules put it. Raises StoreError."""
        with self._lock:
            return self._choose_store_locked(version).open(version)

    def has_whole(self, version: ObjectVersion) -> bool:
        """Whether one of the stores has all of the version and may give it to anybody, as far as can be told without
        opening it."""
        return any(store.has_whole(version) for store in self._stores)

    def open_in_place(self, version: ObjectVersion) -> AbstractContextManager[StoredObject]:
        """While this is entered, the version is open in the store that has most of it, whatever the rules say. Raises
        StoreError."""
        with self._lock:
            return self._choose_store_locked(version, may_move=False).open_in_place(version)

    def _choose_store_locked(self, version: ObjectVersion, *, may_move: bool = True) -> Store:
        """The store that has it open; else, unless it `may_move`, the one with most of it; else the one that the rules
        name."""
        self._lock.assert_held()
        for store in self._stores:
            if store.is_open(version.id):
                return store
        candidate = self._describe_candidate(version)
        belongs_in_memory = None if may_move else tier_placement.is_mostly_in_memory(candidate)
        if belongs_in_memory is None:
            belongs_in_memory = tier_placement.small_belongs_in_memory(candidate, self._small_size)
        return self._memory_store if belongs_in_memory else self._disk_store

    def _describe_candidate(self, version: ObjectVersion) -> TierCandidate:
        return TierCandidate(
            version.size,
            self._disk_store.present_bytes(version.id),
            self._memory_store.present_bytes(version.id),
        )

    # -- both of them

    def usage(self) -> StoreUsage:
        """The sums of both stores' figures; sick if one of them is."""
        memory, disk = (store.usage() for store in self._stores)
        both = {field.name: getattr(memory, field.name) + getattr(disk, field.name) for field in fields(disk)}
        return StoreUsage(**{**both, "sick": memory.sick or disk.sick})

    def objects(self) -> list[ObjectInfo]:
        """Every object version once: one that is in both stores as the store has it that holds more of it."""
        found: dict[ObjectId, ObjectInfo] = {}
        for store in self._stores:
            for info in store.objects():
                known = found.get(info.id)
                if known is None or known.present_bytes < info.present_bytes:
                    found[info.id] = info
        return list(found.values())

    def version_of(self, object_id: ObjectId) -> ObjectVersion | None:
        """The version with this id, if something of it is in either store."""
        return self._memory_store.version_of(object_id) or self._disk_store.version_of(object_id)

    def evict(self, object_id: ObjectId) -> int:
        """Evict the object from both stores; returns the bytes freed. Raises StoreError."""
        return sum(store.evict(object_id) for store in self._stores)

    def set_pinned(self, object_id: ObjectId, is_pinned: bool) -> None:
        """Pin or unpin the object in the store that has it; if none has, the disk's store raises StoreError."""
        for store in self._stores:
            if store.present_bytes(object_id):
                store.set_pinned(object_id, is_pinned)
                return
        self._disk_store.set_pinned(object_id, is_pinned)
