"""The fetches of a service, one per object version that is open or under way."""

from __future__ import annotations

from collections.abc import Callable

from fusecache.errors import AttestationError
from fusecache.fetch.block_source import BlockSource, Route
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.read_observer import ReadObserver
from fusecache.locking import OwnedLock
from fusecache.store.interface import BlockStore
from fusecache.types import ObjectId, ObjectVersion


class FetchTable:
    """`lock` is the scheduling lock; methods without `_locked` take it. `is_scheduled_locked` says whether the
    scheduler holds a file.

    | Fetch | Event | Next state |
    |---|---|---|
    | absent | `acquire`: its object is opened in the store | open once |
    | open | `acquire`, `reopen` | open once more |
    | open | its object is retired in the store: `acquire` | replaced by a new one; its readers keep the old one |
    | open | `release` | open once less; unused if that was the last, and no flight, waiter or plan needs it |
    | unused | `release`, `close_if_unused`, the end of a flight or an inspection | absent, its stored object closed |
    """

    def __init__(
        self,
        lock: OwnedLock,
        store: BlockStore,
        block_source: BlockSource,
        *,
        observer: ReadObserver,
        is_scheduled_locked: Callable[[ObjectFetch], bool],
    ) -> None:
        self._lock = lock
        self._store = store
        self._block_source = block_source
        self._observer = observer
        self._is_scheduled_locked = is_scheduled_locked
        self._fetches: dict[ObjectId, ObjectFetch] = {}

    def __len__(self) -> int:
        return len(self._fetches)

    def acquire(self, version: ObjectVersion, source: str) -> ObjectFetch:
        """The fetch of this version, opened once more; pair it with `release`. Does disk I/O. Raises StoreError."""
        with self._lock:
            object_fetch = self._fetches.get(version.id)
            if object_fetch is not None and not object_fetch.stored.is_retired:
                object_fetch.open_count += 1
                return object_fetch
        stored = self._store.open(version)
        fresh = ObjectFetch(version, source, stored)
        if stored.attestation.quarantine_sha256 is not None:
            text = f"{version.key} is in quarantine: it is not what its manifest says"
            fresh.give_up(AttestationError(text))
        fresh.set_route(self._block_source.route_of(version, stored.block_size))
        self._observer.fetch_opened(fresh)
        with self._lock:
            object_fetch = self._fetches.get(version.id)
            if object_fetch is None or object_fetch.stored.is_retired:
                object_fetch = self._fetches[version.id] = fresh
            object_fetch.open_count += 1
        if object_fetch is not fresh:
            stored.close()
        return object_fetch

    def reopen(self, object_fetch: ObjectFetch) -> bool:
        """Open an open fetch once more, without I/O; False: its object is retired, or another one took its place."""
        with self._lock:
            is_current = (
                self._fetches.get(object_fetch.version.id) is object_fetch
                and not object_fetch.stored.is_retired
            )
            object_fetch.open_count += is_current
        return is_current

    def release(self, object_fetch: ObjectFetch) -> None:
        """Open it once less; what was begun goes on."""
        with self._lock:
            object_fetch.open_count -= 1
            is_removed = self.remove_if_unused_locked(object_fetch)
        if is_removed:
            object_fetch.stored.close()

    def close_if_unused(self, object_fetch: ObjectFetch) -> None:
        """Close its stored object if no reader has it open, and nothing is under way or planned."""
        with self._lock:
            is_removed = self.remove_if_unused_locked(object_fetch)
        if is_removed:
            object_fetch.stored.close()

    def remove_if_unused_locked(self, object_fetch: ObjectFetch) -> bool:
        """Take it out of the table if it is unused. Returns whether the caller has to close its stored object, after
        it let go of the lock."""
        self._lock.assert_held()
        if not object_fetch.is_unused() or self._is_scheduled_locked(object_fetch):
            return False
        if self._fetches.get(object_fetch.version.id) is object_fetch:
            del self._fetches[object_fetch.version.id]
            return True
        return object_fetch.stored.is_retired

    def find_locked(self, object_id: ObjectId) -> ObjectFetch | None:
        """The fetch of this version; None: it is neither open nor under way."""
        self._lock.assert_held()
        return self._fetches.get(object_id)

    def new_routes(self) -> list[tuple[ObjectFetch, Route | None]]:
        """Where the stripes of each fetch come from by now. May take milliseconds per fetch."""
        with self._lock:
            fetches = list(self._fetches.values())
        return [
            (object_fetch, self._block_source.route_of(object_fetch.version, object_fetch.stored.block_size))
            for object_fetch in fetches
        ]

    def close(self) -> None:
        """Close all stored objects; no thread uses them any more."""
        with self._lock:
            fetches = list(self._fetches.values())
            self._fetches.clear()
        for object_fetch in fetches:
            object_fetch.stored.close()
