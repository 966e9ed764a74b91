"""The settings of prefetching, and its questions to the catalog and to other nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fusecache.types import ObjectVersion


@dataclass(frozen=True)
class PrefetchSettings:
    """Without `is_enabled` nothing is fetched ahead. `budget`: bytes of shards that are fetched ahead of the file being
    read. `learn`: record in which order models are read, and follow it. `read_ahead`: bytes that the kernel reads ahead
    of readers that are recorded."""

    is_enabled: bool = True
    budget: int = 1 << 62
    learn: bool = True
    read_ahead: int = 1 << 20


class CatalogView(Protocol):
    """The catalog, as prefetching sees it. Called without a lock, from any thread."""

    def siblings(self, version: ObjectVersion) -> Sequence[ObjectVersion]:
        """The files of the same folder, itself included. Does not block."""
        ...


class PeerProfiles(Protocol):
    """The access profiles of other nodes. Thread-safe."""

    def find_profile(self, name: str) -> bytes | None:
        """The profile of this name, packed, if another node has it; blocks for a second at most. Raises nothing."""
        ...

    def offer_profile(self, name: str) -> None:
        """Tell other nodes that it is here; blocks for a second at most. Raises nothing."""
        ...
