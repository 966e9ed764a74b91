"""What those who decide what is fetched ahead need of the loader."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from fusecache.fetch.waiter import Waiter
from fusecache.store.interface import BlockStore
from fusecache.types import ObjectId, ObjectVersion

if TYPE_CHECKING:
    from fusecache.fetch.object_fetch import ObjectFetch


class Office(Protocol):
    """A Loader, as they see it. `lock` guards its scheduling state, and is held for microseconds."""

    lock: threading.Lock
    store: BlockStore

    def acquire_fetch(self, version: ObjectVersion, source: str) -> ObjectFetch:
        """The load of this version, opened once more; does disk I/O. Raises StoreError."""

    def release_fetch(self, object_fetch: ObjectFetch) -> None:
        """One open less."""

    def close_if_unused(self, object_fetch: ObjectFetch) -> None:
        """Close it, if nobody has it open and nothing is under way."""

    def find_fetch_locked(self, object_id: ObjectId) -> ObjectFetch | None:
        """The load of this version, if there is one. With the lock."""

    def request_header(
        self, object_fetch: ObjectFetch, offset: int, length: int, on_settled: Callable[[Waiter], None]
    ) -> Waiter | None:
        """Like `request`, behind all that readers wait for."""

    def read_bytes(self, object_fetch: ObjectFetch, offset: int, length: int) -> bytes:
        """See Loader."""

    def copy_bytes(
        self, object_fetch: ObjectFetch, offset: int, length: int, pieces: Mapping[int, bytes]
    ) -> bytes | None:
        """See Loader."""

    def inspect_if_unattested(self, object_fetch: ObjectFetch) -> None:
        """If it is sealed, have what is there of it looked at. Without the lock."""

    def queue_task(self, task: Callable[[], None]) -> None:
        """Have this done soon, by one of the crew. Without the lock."""

    def wake_workers_locked(self) -> None:
        """There is work, or a time to keep. With the lock."""
