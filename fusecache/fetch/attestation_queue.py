"""Unattested objects of which more arrived than an inspector looked at: from the gate to the inspector."""

from __future__ import annotations

import queue

from fusecache.fetch.object_fetch import ObjectFetch


class AttestationQueue:
    """Built before both ends. Thread-safe; putting never waits."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[ObjectFetch | None] = queue.SimpleQueue()

    def put(self, object_fetch: ObjectFetch) -> None:
        """More of this object arrived: an inspector takes it, and calls `AttestationGate.inspection_ended` once."""
        self._queue.put(object_fetch)

    def put_end(self) -> None:
        """One of the threads that take is to end."""
        self._queue.put(None)

    def take(self) -> ObjectFetch | None:
        """The next object, None: the thread that takes is to end. Blocks until there is one."""
        return self._queue.get()
