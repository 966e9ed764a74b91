"""Records of all objects in the store, as one process knows them, in the order of their eviction. Thread-safe, no I/O.

The files are the truth. The table is what the index said at the start, corrected by the background scan and by what
this process does itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fusecache.locking import OwnedLock
from fusecache.store.disk.files import BlocksFileSummary
from fusecache.store.eviction import S3Fifo
from fusecache.types import ObjectId, ObjectVersion


@dataclass(frozen=True)
class ObjectRecord:
    """One object version. `present_bytes` are the object's own, `stored_bytes` what the ledger counts for them;
    `accesses` and `is_in_main` are its place in the order of eviction. The fields are the keys of the index's JSON."""

    version: ObjectVersion
    block_size: int
    present_bytes: int
    stored_bytes: int
    is_pinned: bool
    last_use_ns: int
    accesses: int = 0
    is_in_main: bool = False
    attestation_state: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether all bytes are here."""
        return self.present_bytes == self.version.size


def record_from_summary(summary: BlocksFileSummary) -> ObjectRecord:
    """The record of what a .blocks file says."""
    state = summary.state
    return ObjectRecord(
        summary.version,
        summary.block_size,
        summary.present_bytes,
        summary.stored_bytes,
        state.is_pinned,
        state.last_use_ns,
        state.accesses,
        attestation_state=int(state.attestation.state),
    )


class ObjectTable:
    """All records, the eviction policy over them, and which of them the index has yet to be told of.

    `_lock` guards all of it; it is the last in the store's order of locks. Reads of one record take no lock.
    """

    def __init__(self) -> None:
        self._lock = OwnedLock()
        self._records: dict[ObjectId, ObjectRecord] = {}
        self._policy = S3Fifo()
        self._changed_ids: set[ObjectId] = set()
        self._watched_id: ObjectId | None = None
        """The object whose files the scan is reading, as long as this process has not changed its record."""

    def load_records(
        self, records: Iterable[tuple[ObjectId, ObjectRecord]], ghosts: Iterable[tuple[ObjectId, int]]
    ) -> None:
        """Take over what the index knew, in its order of eviction; records that are here are newer, and stay."""
        with self._lock:
            for object_id, size in ghosts:
                self._policy.add_ghost(object_id, size)
            for object_id, record in records:
                if object_id not in self._records:
                    self._store_record_locked(object_id, record)

    def watch_object(self, object_id: ObjectId) -> None:
        """The scan is about to read the files of this object, one object at a time: note for `put_if_unchanged` whether
        its record changes meanwhile."""
        with self._lock:
            self._watched_id = object_id

    def put_if_unchanged(self, object_id: ObjectId, record: ObjectRecord) -> None:
        """Add or update an object as its files were read after `watch_object`, unless its record has changed since.

        Without this: the scan reads a file, the object is filled and closed (or evicted) and recorded so, and the scan
        overwrites that with what it read before.
        """
        with self._lock:
            if self._watched_id == object_id:
                self._change_record_locked(object_id, record)

    def put_record(self, object_id: ObjectId, record: ObjectRecord) -> None:
        """Add or update an object."""
        with self._lock:
            self._change_record_locked(object_id, record)

    def _change_record_locked(self, object_id: ObjectId, record: ObjectRecord) -> None:
        self._lock.assert_held()
        if self._watched_id == object_id:
            self._watched_id = None
        old = self._records.get(object_id)
        if old == record:
            return
        self._store_record_locked(object_id, record)
        if old is not None and record.last_use_ns > old.last_use_ns and record.accesses:
            self._policy.count_use(object_id)
        self._changed_ids.add(object_id)

    def _store_record_locked(self, object_id: ObjectId, record: ObjectRecord) -> None:
        self._lock.assert_held()
        self._records[object_id] = record
        # for a known object the uses that count are the policy's own, and not all that the file ever saw
        self._policy.add(object_id, record.stored_bytes, uses=record.accesses, is_in_main=record.is_in_main)

    def forget_object(self, object_id: ObjectId, *, was_evicted: bool = False) -> None:
        """Forget an object whose files are gone; one that `was_evicted` is remembered as a ghost."""
        with self._lock:
            if self._watched_id == object_id:
                self._watched_id = None
            if self._records.pop(object_id, None) is not None:
                self._policy.remove(object_id, was_evicted=was_evicted)
                self._changed_ids.add(object_id)

    def get(self, object_id: ObjectId) -> ObjectRecord | None:
        """The record, if there is one. Takes no lock."""
        return self._records.get(object_id)

    def snapshot(self) -> list[tuple[ObjectId, ObjectRecord]]:
        """All records now."""
        with self._lock:
            return list(self._records.items())

    def can_free(self, nbytes: int, is_evictable: Callable[[ObjectId], bool]) -> bool:
        """Whether eviction could free `nbytes`. Looks at no more records than it takes to say yes."""
        for object_id, record in self.snapshot():
            if nbytes <= 0:
                break
            if is_evictable(object_id):
                nbytes -= record.stored_bytes
        return nbytes <= 0

    def victims(self, is_evictable: Callable[[ObjectId], bool]) -> Iterable[ObjectId]:
        """Objects to evict, in the policy's order, until no evictable one is left. The caller evicts each, and has it
        forgotten, before it asks for the next; the lock is not held meanwhile."""
        walk = self._policy.victims(is_evictable)
        while True:
            with self._lock:
                object_id = next(walk, None)
            if object_id is None:
                return
            yield object_id

    def pop_changes(self) -> tuple[list[tuple[ObjectId, ObjectRecord]], list[ObjectId]]:
        """Records that were changed, and ids that were forgotten, since the last call."""
        with self._lock:
            dirty, self._changed_ids = self._changed_ids, set()
            changed = []
            for object_id in dirty & self._records.keys():
                changed.append((object_id, self._records[object_id]))
            return changed, [x for x in dirty if x not in self._records]

    def eviction_place(self, object_id: ObjectId) -> tuple[int, bool]:
        """Uses that count for the object, and whether it is in the main queue."""
        with self._lock:
            return self._policy.use_count(object_id), self._policy.is_in_main(object_id)

    def eviction_order(self) -> tuple[list[ObjectId], list[tuple[ObjectId, int]]]:
        """All ids in the order of eviction, and the ghosts."""
        with self._lock:
            return list(self._policy.eviction_order()), list(self._policy.ghosts())
