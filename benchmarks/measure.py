"""Fair comparison on an unfair machine: contestants alternate, and only neighbours are divided.

The load of a shared machine drifts within seconds. Each round runs every contestant once, in an order that
rotates, and yields one ratio per round; the median of the rounds is the result.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
TICKS = os.sysconf("SC_CLK_TCK")


def interleave(
    contestants: Mapping[str, Callable[[], float]],
    rounds: int,
    *,
    before: Callable[[], None] = lambda: None,
    progress: Callable[[str], None] = lambda _text: None,
) -> dict[str, list[float]]:
    """Seconds per contestant and round; `before` runs ahead of each measurement."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            progress(f"{name}, round {number + 1} of {rounds}")
            before()
            seconds[name].append(contestants[name]())
    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """above / below, round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def median(values: Iterable[float]) -> float:
    """The median."""
    return float(statistics.median(values))


def drop_page_cache(files: Iterable[Path]) -> str:
    """Drop the cached pages of these files, of the whole machine where allowed; says which way it took.

    Pages of tmpfs are the data itself and stay: with the store in tmpfs this empties the mounts' caches only.
    """
    for file in files:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    try:
        DROP_CACHES.write_text("1\n")
    except OSError:
        return "posix_fadvise(DONTNEED)"
    return "posix_fadvise(DONTNEED) and drop_caches"


@dataclass(frozen=True)
class Usage:
    """The use of a process up to now: CPU seconds, and its peak of resident memory in bytes."""

    cpu_seconds: float
    rss_peak: int
    system_seconds: float
    """Of the CPU seconds, those inside the kernel: copies, page faults, system calls."""


def usage_of(pid: int) -> Usage:
    """Read it from /proc; raises OSError when the process is gone."""
    # The second field, the program's name, may hold spaces and brackets.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    peak = next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")), 0)
    return Usage((int(fields[11]) + int(fields[12])) / TICKS, peak, int(fields[12]) / TICKS)
