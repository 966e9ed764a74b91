"""What those who decide what is fetched ahead need of the loader."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from fusecache.loader.waiters import Waiter
from fusecache.store.interface import BlockStore
from fusecache.types import ObjectId, ObjectVersion

if TYPE_CHECKING:
    from fusecache.loader.load import ObjectLoad


class Office(Protocol):
    """A Loader, as they see it. `lock` guards its scheduling state, and is held for microseconds."""

    lock: threading.Lock
    store: BlockStore

    def obtain(self, version: ObjectVersion, source: str) -> ObjectLoad:
        """The load of this version, opened once more; does disk I/O. Raises StoreError."""

    def release(self, load: ObjectLoad) -> None:
        """One open less."""

    def let_go(self, load: ObjectLoad) -> None:
        """Close it, if nobody has it open and nothing is under way."""

    def loaded(self, object_id: ObjectId) -> ObjectLoad | None:
        """The load of this version, if there is one. With the lock."""

    def request_head(
        self, load: ObjectLoad, offset: int, length: int, settled: Callable[[Waiter], None]
    ) -> Waiter | None:
        """Like `request`, behind all that readers wait for."""

    def read(self, load: ObjectLoad, offset: int, length: int) -> bytes:
        """See Loader."""

    def copy_out(
        self, load: ObjectLoad, offset: int, length: int, pieces: Mapping[int, bytes]
    ) -> bytes | None:
        """See Loader."""

    def inspect(self, load: ObjectLoad) -> None:
        """If it is sealed, have what is there of it looked at. Without the lock."""

    def task(self, work: Callable[[], None]) -> None:
        """Have this done soon, by one of the crew. Without the lock."""

    def wake(self) -> None:
        """There is work, or a time to keep. With the lock."""
