"""How fast bytes move: over the last second, at best, and while anything moved at all. Pure; the caller has the clock
and the lock. Times are in seconds, paces in bytes per second."""

from __future__ import annotations

from collections import deque

_WINDOW_SECONDS = 1.0
_MIN_SECONDS = 0.1
"""Seconds of arrivals before a pace is worth telling: the first connections are just starting up."""
_SURE_SECONDS = 0.5
"""Seconds of arrivals after which a pace that is slow is not just the beginning."""
MEASUREMENT_LIFETIME = 600.0
"""Seconds for which something measured is taken for true."""
_MIN_BYTES = 64 << 20
"""Bytes after which the pace of a disk is worth telling."""
_DECAY_BYTES = 512 << 20
"""Bytes of which half are forgotten: a disk whose own cache is full, or whose credits are spent, gets slower."""


class Throughput:
    """Bytes per second, from the arrivals of the last second."""

    def __init__(self) -> None:
        self._arrivals: deque[tuple[float, int]] = deque()
        self._window_bytes = 0

    def add_arrival(self, now: float, length: int) -> None:
        """`length` bytes arrived at `now`."""
        self._arrivals.append((now, length))
        self._window_bytes += length
        self._drop_old_arrivals(now)

    def _drop_old_arrivals(self, now: float) -> None:
        while self._arrivals and self._arrivals[0][0] < now - _WINDOW_SECONDS:
            self._window_bytes -= self._arrivals.popleft()[1]

    def bytes_per_second(self, now: float, min_seconds: float = _MIN_SECONDS) -> float | None:
        """The pace; None: nothing arrived lately, or not for `least` seconds."""
        self._drop_old_arrivals(now)
        if not self._arrivals or now - self._arrivals[0][0] < min_seconds:
            return None
        return self._window_bytes / (now - self._arrivals[0][0])

    def is_below(self, limit: float, now: float) -> bool:
        """Whether bytes arrive, and have for a while, more slowly than this."""
        pace = self.bytes_per_second(now, _SURE_SECONDS)
        return pace is not None and pace < limit


class PeakThroughput:
    """The best pace of a second in the last LASTING seconds: what a network can do, if not always does."""

    def __init__(self) -> None:
        self._throughput = Throughput()
        self._peaks: deque[tuple[float, float]] = deque()
        """(when, pace): falling, so that the first is the best, and the others are what is left when it is too old."""

    def add_arrival(self, now: float, length: int) -> None:
        """`length` bytes arrived at `now`."""
        self._throughput.add_arrival(now, length)
        pace = self._throughput.bytes_per_second(now, _SURE_SECONDS)
        if pace is not None:
            while self._peaks and self._peaks[-1][1] <= pace:
                self._peaks.pop()
            if not self._peaks or now - self._peaks[-1][0] > _WINDOW_SECONDS:
                self._peaks.append((now, pace))

    def bytes_per_second(self, now: float) -> float | None:
        """The pace; None: there was no second of arrivals."""
        while self._peaks and self._peaks[0][0] < now - MEASUREMENT_LIFETIME:
            self._peaks.popleft()
        return self._peaks[0][1] if self._peaks else None


class BusyThroughput:
    """Bytes per second of the time in which at least one call was under way, from several threads. Of writes to a disk
    that is the pace of the page cache as long as that takes them, and the disk's from then on."""

    def __init__(self) -> None:
        self._calls_under_way = 0
        self._busy_since = 0.0
        self._busy_seconds = 0.0
        self._moved_bytes = 0
        self._last_call_end = 0.0

    def begin_call(self, now: float) -> None:
        """A call begins."""
        if self._calls_under_way == 0:
            self._busy_since = now
        self._calls_under_way += 1

    def end_call(self, now: float, length: int) -> None:
        """A call ends, and has moved so many bytes."""
        self._calls_under_way -= 1
        self._moved_bytes += length
        self._busy_seconds += now - self._busy_since
        self._busy_since = self._last_call_end = now
        if self._moved_bytes > _DECAY_BYTES:
            self._moved_bytes //= 2
            self._busy_seconds /= 2

    def bytes_per_second(self, now: float) -> float | None:
        """The pace; None: too little was moved, or none of it lately."""
        if (
            self._moved_bytes < _MIN_BYTES
            or self._busy_seconds <= 0
            or now - self._last_call_end > MEASUREMENT_LIFETIME
        ):
            return None
        return self._moved_bytes / self._busy_seconds
