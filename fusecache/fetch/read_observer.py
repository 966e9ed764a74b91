"""The seam between readers and the part that decides what is fetched ahead: it is told of them, and asked.

Fetching, the device channel and the open files tell it. None of them knows its observers: `fetch` imports no prefetch.
"""

from __future__ import annotations

from collections.abc import Sequence

from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.types import ObjectVersion


class ReadObserver:
    """Listens to readers; this one does nothing, and holds nothing back. A method whose name ends in `_locked` is
    called with the scheduling lock of the service that tells; all others are called without it, from any thread."""

    def fetch_opened(self, object_fetch: ObjectFetch) -> None:
        """A new fetch, which no other thread sees yet, is about to be opened. May do disk I/O."""

    def blocks_missed_locked(self, object_fetch: ObjectFetch, missing: Sequence[int]) -> None:
        """A reader asks for blocks, and these of them are not there. Takes microseconds."""

    def hold_back_locked(self, object_fetch: ObjectFetch) -> float:
        """All of this file is about to be fetched: for how many seconds is nothing fetched of it without a waiter?
        Takes microseconds."""
        return 0.0

    def observes_reads(self, object_fetch: ObjectFetch) -> bool:
        """Whether `read` is to be called for this fetch. Takes microseconds."""
        return False

    def needs_exact_reads(self, object_fetch: ObjectFetch) -> bool:
        """Whether readers ought to ask for what they are after and little more, so that the kernel is to read little
        ahead. Takes microseconds."""
        return False

    def read(self, object_fetch: ObjectFetch, offset: int, length: int, process_id: int) -> None:
        """A reader, of this process, asks for these bytes. Takes microseconds."""

    def file_opened(self, version: ObjectVersion, *, is_passthrough: bool) -> bool:
        """A program opened a file, whose reads the kernel answers if `is_passthrough`. Returns whether `file_closed`
        is to be called for it. May look at the disk."""
        return False

    def file_closed(self, version: ObjectVersion) -> None:
        """The last program that had this file open closed it. Takes microseconds."""

    def whole_file_wanted(self, version: ObjectVersion, source: str) -> None:
        """A file is read for the first time, or opened by a program that is going to read all of it. May look at the
        disk."""

    def close(self) -> None:
        """The mount goes away. May do disk I/O."""


class ReadObservers(ReadObserver):
    """Tells every observer that subscribed; built before the parts that tell and before those that listen. Observers
    subscribe while the node is built."""

    def __init__(self) -> None:
        self._observers: tuple[ReadObserver, ...] = ()

    def subscribe(self, observer: ReadObserver) -> None:
        """Tell this one too, from now on."""
        self._observers = (*self._observers, observer)

    def fetch_opened(self, object_fetch: ObjectFetch) -> None:
        """Tells all of a new fetch."""
        for observer in self._observers:
            observer.fetch_opened(object_fetch)

    def blocks_missed_locked(self, object_fetch: ObjectFetch, missing: Sequence[int]) -> None:
        """Tells all which blocks were missing."""
        for observer in self._observers:
            observer.blocks_missed_locked(object_fetch, missing)

    def hold_back_locked(self, object_fetch: ObjectFetch) -> float:
        """The longest time for which one of them wants it held back, in seconds."""
        return max((observer.hold_back_locked(object_fetch) for observer in self._observers), default=0.0)

    def observes_reads(self, object_fetch: ObjectFetch) -> bool:
        """Whether one of them listens to the reads of this fetch."""
        return any(observer.observes_reads(object_fetch) for observer in self._observers)

    def needs_exact_reads(self, object_fetch: ObjectFetch) -> bool:
        """Whether one of them needs exact reads of this fetch."""
        return any(observer.needs_exact_reads(object_fetch) for observer in self._observers)

    def read(self, object_fetch: ObjectFetch, offset: int, length: int, process_id: int) -> None:
        """Tells all of a read."""
        for observer in self._observers:
            observer.read(object_fetch, offset, length, process_id)

    def file_opened(self, version: ObjectVersion, *, is_passthrough: bool) -> bool:
        """Tells all of an open; whether one of them wants to be told of the close."""
        wants_close = False
        for observer in self._observers:
            wants_close |= observer.file_opened(version, is_passthrough=is_passthrough)
        return wants_close

    def file_closed(self, version: ObjectVersion) -> None:
        """Tells all of a close."""
        for observer in self._observers:
            observer.file_closed(version)

    def whole_file_wanted(self, version: ObjectVersion, source: str) -> None:
        """Tells all that a file is read."""
        for observer in self._observers:
            observer.whole_file_wanted(version, source)

    def close(self) -> None:
        """Tells all that the mount goes away."""
        for observer in self._observers:
            observer.close()
