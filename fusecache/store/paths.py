"""Whether an object is to be kept on the disk or in memory: the rules, without I/O.

What was not measured decides nothing: then it is the disk. What is somewhere stays there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

CLEARLY = 1.5
"""So many times slower is slower: a load that goes another way is not worth it for less, and paces vary by as much."""


@dataclass(frozen=True)
class Paces:
    """What was measured, in bytes per second; None: nothing yet. `write`: what the disk takes; `arriving`: what comes
    from the network at best."""

    write: float | None = None
    arriving: float | None = None


@dataclass(frozen=True)
class Found:
    """An object that nobody has open: its size, how many bytes of it are on the disk and in memory; `fits`: memory has
    room for all of it without giving up what was used lately."""

    size: int
    on_disk: int
    in_memory: int
    fits: Callable[[], bool]


def is_slower(this: float | None, that: float | None) -> bool:
    """Whether one pace is known to be clearly below another one."""
    return this is not None and that is not None and this * CLEARLY < that


def small_in_memory(found: Found, small_size: int) -> bool:
    """`store=small`: whether memory is the place."""
    return found.size > small_size and found.on_disk < found.size


def auto_in_memory(found: Found, paces: Paces) -> bool:
    """`store=auto`: whether memory is the place."""
    if found.in_memory or found.on_disk:
        return found.in_memory >= found.on_disk
    return is_slower(paces.write, paces.arriving) and found.fits()
