"""An origin in memory whose every step a test decides: for what no server can be made to do at a given moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from fusecache.errors import CancelledReadError, NotFoundError, UnavailableError
from fusecache.origin.interface import OriginStats, never_cancelled
from fusecache.types import ObjectVersion
from tests.support.content import content

if TYPE_CHECKING:
    from typing_extensions import Buffer

IDENTITY = "test://bucket"
WAIT = 20.0
"""Seconds after which a step that never comes fails the test."""


def version(key: str, size: int, etag: str = "1") -> ObjectVersion:
    """A version whose bytes are `content(key, etag, ...)`."""
    return ObjectVersion(IDENTITY, key, etag, size, 0)


class ScriptedOrigin:
    """Serves `content` of any version asked for, chunk by chunk. `gate(version, offset)` is called before each
    chunk and may block or raise; `reads` lists the ranges asked for."""

    identity = IDENTITY
    engine = "scripted"

    def __init__(self, versions: Sequence[ObjectVersion] = (), *, chunk: int = 64 << 10) -> None:
        self.stats = OriginStats()
        self.versions = {found.key: found for found in versions}
        self.reads: list[tuple[str, int, int]] = []
        self.gate: Callable[[ObjectVersion, int], None] = lambda _version, _offset: None
        self.digests: dict[str, bytes] = {}
        """sha256 by the id of the version, as metadata has it."""
        self.open_reads = 0
        self.most_reads = 0
        self._chunk = chunk
        self._lock = threading.Lock()

    def list_objects(self) -> Iterator[ObjectVersion]:
        """The versions of the script."""
        self.stats.add(requests=1, lists=1)
        yield from list(self.versions.values())

    def stat_object(self, key: str) -> ObjectVersion:
        """The version that stands in the script, or the error."""
        self.stats.add(requests=1)
        if key not in self.versions:
            raise NotFoundError(f"{key}: no such object")
        return self.versions[key]

    def read_metadata_sha256(self, version: ObjectVersion) -> bytes | None:
        """As the script has it."""
        self.stats.add(requests=1)
        return self.digests.get(version.id)

    def read_range(
        self,
        version: ObjectVersion,
        offset: int,
        length: int,
        *,
        deadline: float | None = None,
        cancelled: Callable[[], bool] = never_cancelled,
    ) -> Iterator[Buffer]:
        """As the script has it."""
        with self._lock:
            self.reads.append((version.key, offset, length))
            self.open_reads += 1
            self.most_reads = max(self.most_reads, self.open_reads)
        self.stats.add(requests=1)
        try:
            while length:
                if cancelled():
                    raise CancelledReadError("cancelled")
                if deadline is not None and time.monotonic() > deadline:
                    raise UnavailableError("deadline")
                self.gate(version, offset)
                size = min(length, self._chunk)
                yield content(version.key, version.etag, offset, size)
                self.stats.add(bytes=size)
                offset += size
                length -= size
        finally:
            with self._lock:
                self.open_reads -= 1

    def close(self) -> None:
        """Nothing to close."""


class Step:
    """A gate that holds all chunks at or behind an offset until `open`."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self._open = threading.Event()
        self._arrived = threading.Event()

    def hold_from(self, offset: int) -> Callable[[ObjectVersion, int], None]:
        """The gate."""

        def gate(_version: ObjectVersion, at: int) -> None:
            if at >= offset:
                self.held.add(at)
                self._arrived.set()
                if not self._open.wait(WAIT):
                    raise AssertionError("the gate was never opened")

        return gate

    def arrived(self) -> bool:
        """Wait until something is held."""
        return self._arrived.wait(WAIT)

    def open(self) -> None:
        """Let everything through."""
        self._open.set()
