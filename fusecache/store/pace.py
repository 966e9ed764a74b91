"""How fast bytes move: over the last second, at best, and while anything moved at all. Pure; the caller has the clock
and the lock. Times are in seconds, paces in bytes per second."""

from __future__ import annotations

from collections import deque

_WINDOW = 1.0
_LEAST = 0.1
"""Seconds of arrivals before a pace is worth telling: the first connections are just starting up."""
_SURE = 0.5
"""Seconds of arrivals after which a pace that is slow is not just the beginning."""
LASTING = 600.0
"""Seconds for which something measured is taken for true."""
_ENOUGH = 64 << 20
"""Bytes after which the pace of a disk is worth telling."""
_FORGET = 512 << 20
"""Bytes of which half are forgotten: a disk whose own cache is full, or whose credits are spent, gets slower."""


class Pace:
    """Bytes per second, from the arrivals of the last second."""

    def __init__(self) -> None:
        self._arrivals: deque[tuple[float, int]] = deque()
        self._total = 0

    def add(self, now: float, length: int) -> None:
        """`length` bytes arrived at `now`."""
        self._arrivals.append((now, length))
        self._total += length
        self._forget(now)

    def _forget(self, now: float) -> None:
        while self._arrivals and self._arrivals[0][0] < now - _WINDOW:
            self._total -= self._arrivals.popleft()[1]

    def per_second(self, now: float, least: float = _LEAST) -> float | None:
        """The pace; None: nothing arrived lately, or not for `least` seconds."""
        self._forget(now)
        if not self._arrivals or now - self._arrivals[0][0] < least:
            return None
        return self._total / (now - self._arrivals[0][0])

    def is_below(self, limit: float, now: float) -> bool:
        """Whether bytes arrive, and have for a while, more slowly than this."""
        pace = self.per_second(now, _SURE)
        return pace is not None and pace < limit


class Best:
    """The best pace of a second in the last LASTING seconds: what a network can do, if not always does."""

    def __init__(self) -> None:
        self._pace = Pace()
        self._best: deque[tuple[float, float]] = deque()
        """(when, pace): falling, so that the first is the best, and the others are what is left when it is too old."""

    def add(self, now: float, length: int) -> None:
        """`length` bytes arrived at `now`."""
        self._pace.add(now, length)
        pace = self._pace.per_second(now, _SURE)
        if pace is not None:
            while self._best and self._best[-1][1] <= pace:
                self._best.pop()
            if not self._best or now - self._best[-1][0] > _WINDOW:
                self._best.append((now, pace))

    def per_second(self, now: float) -> float | None:
        """The pace; None: there was no second of arrivals."""
        while self._best and self._best[0][0] < now - LASTING:
            self._best.popleft()
        return self._best[0][1] if self._best else None


class Busy:
    """Bytes per second of the time in which at least one call was under way, from several threads. Of writes to a disk
    that is the pace of the page cache as long as that takes them, and the disk's from then on."""

    def __init__(self) -> None:
        self._calls = 0
        self._since = 0.0
        self._seconds = 0.0
        self._bytes = 0
        self._last = 0.0

    def begin(self, now: float) -> None:
        """A call begins."""
        if self._calls == 0:
            self._since = now
        self._calls += 1

    def end(self, now: float, length: int) -> None:
        """A call ends, and has moved so many bytes."""
        self._calls -= 1
        self._bytes += length
        self._seconds += now - self._since
        self._since = self._last = now
        if self._bytes > _FORGET:
            self._bytes //= 2
            self._seconds /= 2

    def per_second(self, now: float) -> float | None:
        """The pace; None: too little was moved, or none of it lately."""
        if self._bytes < _ENOUGH or self._seconds <= 0 or now - self._last > LASTING:
            return None
        return self._bytes / self._seconds
