"""What a process knows of all objects in the store, and in which order it would evict them. Thread-safe, no
I/O.

The files are the truth; this is what the index said at the start, corrected by the background scan and by
what this process does itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fusecache.store.eviction import S3Fifo
from fusecache.store.files import Summary
from fusecache.types import ObjectId, ObjectVersion


@dataclass(frozen=True)
class Record:
    """One object version. `stored_bytes` is what the ledger counts for it, `accesses` and `main` are its
    place in the eviction order."""

    version: ObjectVersion
    block_size: int
    present_bytes: int
    stored_bytes: int
    complete: bool
    pinned: bool
    last_use_ns: int
    accesses: int = 0
    main: bool = False
    mark: int = 0


def from_summary(summary: Summary) -> Record:
    """The record of what a .blocks file says."""
    state = summary.state
    return Record(
        summary.version,
        summary.block_size,
        summary.present_bytes,
        summary.stored_bytes,
        summary.complete,
        state.pinned,
        state.last_use_ns,
        state.accesses,
        mark=int(state.seal.mark),
    )


class Records:
    """All records, the eviction policy over them, and which of them the index has yet to be told of."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: dict[ObjectId, Record] = {}
        self._policy = S3Fifo()
        self._dirty: set[ObjectId] = set()
        self._watched: ObjectId | None = None

    def load(
        self, records: Iterable[tuple[ObjectId, Record]], ghosts: Iterable[tuple[ObjectId, int]]
    ) -> None:
        """Take over what the index knew, in its order of eviction; newer knowledge stays."""
        with self._lock:
            for object_id, size in ghosts:
                self._policy.remember(object_id, size)
            for object_id, record in records:
                if object_id not in self._records:
                    self._put(object_id, record)

    def watch(self, object_id: ObjectId) -> None:
        """The scan is about to read the files of an object; one at a time. See `put_watched`."""
        with self._lock:
            self._watched = object_id

    def put_watched(self, object_id: ObjectId, record: Record) -> None:
        """Add or update an object as its files were read after `watch`, unless it was changed since.

        Without this: the scan reads a file, the object is filled and closed (or evicted) and recorded so, and
        the scan overwrites that with what it read before.
        """
        with self._lock:
            if self._watched == object_id:
                self._change(object_id, record)

    def put(self, object_id: ObjectId, record: Record) -> None:
        """Add or update an object."""
        with self._lock:
            self._change(object_id, record)

    def _change(self, object_id: ObjectId, record: Record) -> None:
        if self._watched == object_id:
            self._watched = None
        old = self._records.get(object_id)
        if old == record:
            return
        self._put(object_id, record)
        if old is not None and record.last_use_ns > old.last_use_ns and record.accesses:
            self._policy.use(object_id)
        self._dirty.add(object_id)

    def _put(self, object_id: ObjectId, record: Record) -> None:
        self._records[object_id] = record
        # for a known object the uses that count are the policy's own, and not all that the file ever saw
        self._policy.add(object_id, record.stored_bytes, uses=record.accesses, main=record.main)

    def drop(self, object_id: ObjectId, *, evicted: bool = False) -> None:
        """Forget an object whose files are gone."""
        with self._lock:
            if self._watched == object_id:
                self._watched = None
            if self._records.pop(object_id, None) is not None:
                self._policy.remove(object_id, evicted=evicted)
                self._dirty.add(object_id)

    def get(self, object_id: ObjectId) -> Record | None:
        """The record, if there is one."""
        return self._records.get(object_id)

    def snapshot(self) -> list[tuple[ObjectId, Record]]:
        """All records now."""
        with self._lock:
            return list(self._records.items())

    def can_free(self, nbytes: int, evictable: Callable[[ObjectId], bool]) -> bool:
        """Whether eviction could free so much. Looks at no more records than it takes to say yes."""
        for object_id, record in self.snapshot():
            if nbytes <= 0:
                break
            if evictable(object_id):
                nbytes -= record.stored_bytes
        return nbytes <= 0

    def victims(self, evictable: Callable[[ObjectId], bool]) -> Iterable[ObjectId]:
        """See S3Fifo.victims; the lock is not held while the caller evicts one."""
        walk = self._policy.victims(evictable)
        while True:
            with self._lock:
                object_id = next(walk, None)
            if object_id is None:
                return
            yield object_id

    def take_dirty(self) -> tuple[list[tuple[ObjectId, Record]], list[ObjectId]]:
        """Records changed and ids dropped since the last call, with the records' present place in the
        eviction order."""
        with self._lock:
            dirty, self._dirty = self._dirty, set()
            changed = []
            for object_id in dirty & self._records.keys():
                changed.append((object_id, self._records[object_id]))
            return changed, [x for x in dirty if x not in self._records]

    def place(self, object_id: ObjectId) -> tuple[int, bool]:
        """Uses that count for the object, and whether it is in the main queue."""
        with self._lock:
            return self._policy.uses(object_id), self._policy.in_main(object_id)

    def order(self) -> tuple[list[ObjectId], list[tuple[ObjectId, int]]]:
        """All ids in the order of eviction, and the ghosts."""
        with self._lock:
            return list(self._policy.order()), list(self._policy.ghosts())
