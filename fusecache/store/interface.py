"""The interface of a store to the rest of the program, wherever it keeps its objects."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from fusecache.store.info import ObjectInfo, StoreUsage
from fusecache.store.object import StoredObject
from fusecache.types import ObjectId, ObjectVersion


class BlockStore(Protocol):
    """A Store, or several that look like one (TieredStore). Thread-safe. All methods but `version_of` and the
    properties may block for disk I/O."""

    @property
    def directories(self) -> Sequence[Path]:
        """Where the data files are: on the disk, if there is one, and in memory."""
        ...

    @property
    def block_size(self) -> int:
        """Bytes of a block."""
        ...

    def open(self, version: ObjectVersion) -> StoredObject:
        """Open an object version; while it is open it is never evicted. All openers in this process share one
        StoredObject per version, and each closes it once. Raises StoreError once the store was closed."""
        ...

    def open_in_place(self, version: ObjectVersion) -> AbstractContextManager[object]:
        """While this is entered, the version is open in the place that has most of it now, whatever the rules of
        placement say. Raises StoreError once the store was closed."""
        ...

    def has_whole(self, version: ObjectVersion) -> bool:
        """Whether all of a version is here and may be given to anybody at once, as far as can be told without opening
        it. One look at the disk."""
        ...

    def version_of(self, object_id: ObjectId) -> ObjectVersion | None:
        """The version with this id, if something of it is here."""
        ...

    def objects(self) -> list[ObjectInfo]:
        """Every object version once, as far as the index and the background scan know. Waits some seconds at most for
        the index to be read."""
        ...

    def usage(self) -> StoreUsage:
        """Figures for `fusecache status`. Just after the start they lack what the index did not tell yet."""
        ...

    def evict(self, object_id: ObjectId) -> int:
        """Evict one object; returns the bytes freed, 0 if it is not here. Raises StoreError when it is pinned or in use
        by this or any other process."""
        ...

    def set_pinned(self, object_id: ObjectId, is_pinned: bool) -> None:
        """Keep an object from eviction, in all processes and after restarts, or let it go again. Raises StoreError when
        nothing of it is here."""
        ...
