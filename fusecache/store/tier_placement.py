"""Whether an object is to be kept on the disk or in memory: the rules, without I/O."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TierCandidate:
    """An object that this process does not have open: its size, and how many of its bytes are on the disk and in
    memory."""

    size: int
    disk_bytes: int
    memory_bytes: int


def small_belongs_in_memory(candidate: TierCandidate, small_size: int) -> bool:
    """Whether `store=small` keeps the object in memory: it is larger than `small_size` bytes, and not already whole on
    the disk."""
    return candidate.size > small_size and candidate.disk_bytes < candidate.size


def is_mostly_in_memory(candidate: TierCandidate) -> bool | None:
    """Whether memory holds at least as many bytes of the object as the disk; None: neither holds any."""
    if not candidate.disk_bytes and not candidate.memory_bytes:
        return None
    return candidate.memory_bytes >= candidate.disk_bytes
