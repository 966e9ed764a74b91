"""Which nodes have nothing of which object."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fusecache.bounded import BoundedDict
from fusecache.peers.exchange import policy
from fusecache.types import ObjectId

_MAX_MISSES = 10_000


class MissTable:
    """Remembers for policy.NOT_STORED_TTL seconds that a node had nothing of an object. Thread-safe: `_lock` guards the
    table and is a leaf. `clock` is like time.monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._misses: BoundedDict[tuple[str, ObjectId], None] = BoundedDict(
            _MAX_MISSES, max_age=policy.NOT_STORED_TTL, clock=clock
        )

    def record_miss(self, name: str, object_id: ObjectId) -> None:
        """The node of this name had nothing of the object just now."""
        with self._lock:
            self._misses[name, object_id] = None

    def may_have(self, name: str, object_id: ObjectId) -> bool:
        """Whether it is worth while to ask the node whether it has something of the object."""
        with self._lock:
            return (name, object_id) not in self._misses
