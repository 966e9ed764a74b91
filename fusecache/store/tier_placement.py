"""Whether an object is to be kept on the disk or in memory: the rules, without I/O.

What was not measured decides nothing: then it is the disk. What is somewhere stays there, but for an object that is
whole on a slow disk, and comes faster from other nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SLOWER_FACTOR = 1.5
"""So many times slower is slower: a load that goes another way is not worth it for less, and paces vary by as much."""


@dataclass(frozen=True)
class MeasuredRates:
    """What was measured, in bytes per second; None: nothing yet. `write`, `read`: what the disk takes and gives;
    `arriving`: what comes from the network at best."""

    disk_write: float | None = None
    disk_read: float | None = None
    network_peak: float | None = None


@dataclass(frozen=True)
class TierCandidate:
    """An object that nobody has open: its size, how many bytes of it are on the disk and in memory; and the answers to
    what takes longer to find out. `fits`: memory has room for all of it without giving up what was used lately;
    `elsewhere`: how fast other nodes would give it, in bytes per second; `resident`: most of the disk's file is in the
    page cache, so that its disk does not matter."""

    size: int
    disk_bytes: int
    memory_bytes: int
    fits_in_memory: Callable[[], bool]
    estimate_peer_throughput: Callable[[], float | None]
    is_in_page_cache: Callable[[], bool]


def is_clearly_slower(this: float | None, that: float | None) -> bool:
    """Whether one pace is known to be clearly below another one."""
    return this is not None and that is not None and this * SLOWER_FACTOR < that


def small_belongs_in_memory(candidate: TierCandidate, small_size: int) -> bool:
    """`store=small`: whether memory is the place."""
    return candidate.size > small_size and candidate.disk_bytes < candidate.size


def auto_belongs_in_memory(candidate: TierCandidate, rates: MeasuredRates) -> bool:
    """`store=auto`: whether memory is the place."""
    if candidate.disk_bytes == candidate.size > candidate.memory_bytes:
        return (
            is_clearly_slower(rates.disk_read, candidate.estimate_peer_throughput())
            and not candidate.is_in_page_cache()
            and candidate.fits_in_memory()
        )
    if candidate.memory_bytes or candidate.disk_bytes:
        return candidate.memory_bytes >= candidate.disk_bytes
    return is_clearly_slower(rates.disk_write, rates.network_peak) and candidate.fits_in_memory()
