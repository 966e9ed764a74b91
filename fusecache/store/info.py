"""Plain data that the store tells about itself."""

from __future__ import annotations

from dataclasses import dataclass

from fusecache.store.disk.format import AttestationState
from fusecache.types import ObjectId, ObjectVersion


@dataclass(frozen=True)
class StoreUsage:
    """Figures of a cache directory; the fields are keys of `fusecache status --json`. `used` and `limit` are in bytes,
    over all processes on the directory; `used` counts the blocks, what is reserved for blocks on their way, and the
    files' own overhead (a few KiB per object); `memory_used` and `memory_limit` are the parts of these in memory.
    `evictions` (objects) and `corrupt_blocks` are counted since this process started. `sick`: the disk failed, and is
    bypassed until it works again."""

    used: int
    limit: int
    objects_complete: int
    objects_partial: int
    evictions: int
    corrupt_blocks: int
    sick: bool
    objects_quarantined: int = 0
    memory_used: int = 0
    memory_limit: int = 0

    @property
    def fullness(self) -> float:
        """Share of the limit that is used: of the disk or of memory, whichever is fuller."""
        places = (
            (self.memory_used, self.memory_limit),
            (self.used - self.memory_used, self.limit - self.memory_limit),
        )
        return max((used / limit for used, limit in places if limit > 0), default=0.0)


@dataclass(frozen=True)
class ObjectInfo:
    """One object version in the store. `present_bytes` counts verified and unverified blocks; `last_use` is
    in seconds since the epoch; `open_count` counts this process's opens only; `attestation_state`: what the inspector
    found when it held the whole object against its manifest."""

    id: ObjectId
    version: ObjectVersion
    present_bytes: int
    is_pinned: bool
    last_use: float
    open_count: int
    attestation_state: AttestationState = AttestationState.NONE
    is_in_memory: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether all bytes are here."""
        return self.present_bytes == self.version.size
