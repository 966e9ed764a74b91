"""What a loader is given and asks for, and what it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fusecache.types import ObjectVersion


@dataclass(frozen=True)
class LoaderSettings:
    """`range_bytes` per request to the origin, `deadline` in seconds for a waiter and a flight, `budget` in bytes
    of shards fetched ahead of the file being read; `concurrency` is the size of the crew."""

    concurrency: int = 16
    range_bytes: int = 16 << 20
    deadline: float = 60.0
    prefetch: bool = True
    budget: int = 1 << 62


class Library(Protocol):
    """What the loader asks the catalog, and tells it. Called without a lock, from any thread."""

    def siblings(self, version: ObjectVersion) -> Sequence[ObjectVersion]:
        """The files of the same folder, itself included."""

    def completed(self, version: ObjectVersion) -> None:
        """All of it is in the store, verified."""

    def gone(self, version: ObjectVersion) -> None:
        """The origin does not have this version any more."""


@dataclass
class LoaderStats:
    """Counters since the start, guarded by the loader's lock."""

    flights: int = 0
    flights_failed: int = 0
    bytes_uncached: int = 0
    """Fetched, and handed over without being stored."""
