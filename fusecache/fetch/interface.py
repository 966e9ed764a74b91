"""What a loader is given and asks for, and what it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from fusecache.fetch.object_fetch import ObjectFetch


@dataclass(frozen=True)
class FetchSettings:
    """`range_bytes` per request to the origin, `deadline` in seconds for a waiter and a flight, `budget` in bytes
    of shards fetched ahead of the file being read; `concurrency` is the size of the crew. `learn`: take down in which
    order models are read, and follow it; `read_ahead` is what the kernel reads ahead then, in bytes."""

    concurrency: int = 16
    range_bytes: int = 16 << 20
    deadline: float = 60.0
    prefetch: bool = True
    prefetch_budget: int = 1 << 62
    learn: bool = True
    read_ahead: int = 1 << 20


class CatalogView(Protocol):
    """What the loader asks the catalog, and tells it. Called without a lock, from any thread."""

    def siblings(self, version: ObjectVersion) -> Sequence[ObjectVersion]:
        """The files of the same folder, itself included."""

    def version_completed(self, version: ObjectVersion) -> None:
        """All of it is in the store, verified."""

    def version_gone(self, version: ObjectVersion) -> None:
        """The origin does not have this version any more."""


class Shelf(Protocol):
    """Where recordings are kept on this node, by the ids of models. Thread-safe; fails silently."""

    def load_profile(self, name: str) -> bytes | None:
        """What was saved under this name."""
        ...

    def save_profile(self, name: str, data: bytes) -> None:
        """Keep it, instead of what was there."""
        ...


class PeerProfiles(Protocol):
    """What other nodes may know. Thread-safe."""

    def find_profile(self, name: str) -> bytes | None:
        """The recording of this name that one of them has; takes a second at most."""
        ...

    def offer_profile(self, name: str) -> None:
        """Let them know that it is here; takes a second at most."""
        ...


class Inspector(Protocol):
    """Who vouches for sealed objects (see store.seals), or does not."""

    def request_inspection(self, object_fetch: ObjectFetch) -> None:
        """More of a sealed object landed. Quick; `Loader.looked` is called once for it, later, from another thread."""


@dataclass
class FetchStats:
    """Counters since the start, guarded by the loader's lock."""

    flights: int = 0
    flights_failed: int = 0
    bytes_uncached: int = 0
    """Fetched, and handed over without being stored."""
