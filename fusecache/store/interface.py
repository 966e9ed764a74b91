"""What the rest of the program asks of a store, wherever that keeps its objects."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from fusecache.store.info import ObjectInfo, StoreUsage
from fusecache.store.object import StoredObject
from fusecache.types import ObjectId, ObjectVersion


class BlockStore(Protocol):
    """A Store, or several that look like one (tiers.py). Thread-safe; for what the methods do, see Store."""

    @property
    def directories(self) -> Sequence[Path]:
        """Where the data files are: on the disk, if there is one, and in memory."""
        ...

    @property
    def block_size(self) -> int:
        """Bytes of a block."""
        ...

    def open(self, version: ObjectVersion) -> StoredObject:
        """Open an object version, wherever it is to be. Raises StoreError."""
        ...

    def has_whole(self, version: ObjectVersion) -> bool:
        """Whether all of a version is here, as far as can be told without opening it."""
        ...

    def open_in_place(self, version: ObjectVersion) -> AbstractContextManager[object]:
        """While this is entered, the version is open in the place that has most of it now, whatever the rules of
        placement say. Raises StoreError."""
        ...

    def usage(self) -> StoreUsage:
        """Figures, of all of it."""
        ...

    def objects(self) -> list[ObjectInfo]:
        """Every object version, once."""
        ...

    def version_of(self, object_id: ObjectId) -> ObjectVersion | None:
        """The version with this id, if something of it is here."""
        ...

    def evict(self, object_id: ObjectId) -> int:
        """Evict one object; returns the bytes freed. Raises StoreError."""
        ...

    def set_pinned(self, object_id: ObjectId, is_pinned: bool) -> None:
        """Keep it from eviction, or let it go again. Raises StoreError."""
        ...
