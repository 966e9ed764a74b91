"""Whether an object is to be kept on the disk or in memory: the rules, without I/O.

What was not measured decides nothing: then it is the disk. What is somewhere stays there, but for an object that is
whole on a slow disk, and comes faster from other nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

CLEARLY = 1.5
"""So many times slower is slower: a load that goes another way is not worth it for less, and paces vary by as much."""


@dataclass(frozen=True)
class Paces:
    """What was measured, in bytes per second; None: nothing yet. `write`, `read`: what the disk takes and gives;
    `arriving`: what comes from the network at best."""

    write: float | None = None
    read: float | None = None
    arriving: float | None = None


@dataclass(frozen=True)
class Found:
    """An object that nobody has open: its size, how many bytes of it are on the disk and in memory; and the answers to
    what takes longer to find out. `fits`: memory has room for all of it without giving up what was used lately;
    `elsewhere`: how fast other nodes would give it, in bytes per second; `resident`: most of the disk's file is in the
    page cache, so that its disk does not matter."""

    size: int
    on_disk: int
    in_memory: int
    fits: Callable[[], bool]
    elsewhere: Callable[[], float | None]
    resident: Callable[[], bool]


def is_slower(this: float | None, that: float | None) -> bool:
    """Whether one pace is known to be clearly below another one."""
    return this is not None and that is not None and this * CLEARLY < that


def small_in_memory(found: Found, small_size: int) -> bool:
    """`store=small`: whether memory is the place."""
    return found.size > small_size and found.on_disk < found.size


def auto_in_memory(found: Found, paces: Paces) -> bool:
    """`store=auto`: whether memory is the place."""
    if found.on_disk == found.size > found.in_memory:
        return is_slower(paces.read, found.elsewhere()) and not found.resident() and found.fits()
    if found.in_memory or found.on_disk:
        return found.in_memory >= found.on_disk
    return is_slower(paces.write, paces.arriving) and found.fits()
