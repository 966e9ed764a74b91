"""How fast bytes arrive: over the last second, and in the best second of the last ten minutes.

Pure and not thread-safe: the caller has the clock and the lock. Times are in seconds, rates in bytes per second.
"""

from __future__ import annotations

from collections import deque

_WINDOW_SECONDS = 1.0
_MIN_SECONDS = 0.1
"""Seconds of arrivals before a rate is worth telling: the first connections are just starting up."""
_SURE_SECONDS = 0.5
"""Seconds of arrivals after which a low rate is not just the beginning."""
PEAK_LIFETIME = 600.0
"""Seconds for which a peak counts."""


class Throughput:
    """Bytes per second, from the arrivals of the last second."""

    def __init__(self) -> None:
        self._arrivals: deque[tuple[float, int]] = deque()
        self._window_bytes = 0

    def add_arrival(self, now: float, length: int) -> None:
        """Count `length` bytes that arrived at `now`, which never goes back."""
        self._arrivals.append((now, length))
        self._window_bytes += length
        self._drop_old_arrivals(now)

    def _drop_old_arrivals(self, now: float) -> None:
        while self._arrivals and self._arrivals[0][0] < now - _WINDOW_SECONDS:
            self._window_bytes -= self._arrivals.popleft()[1]

    def bytes_per_second(self, now: float, min_seconds: float = _MIN_SECONDS) -> float | None:
        """The rate of the last second; None: nothing arrived in it, or the first arrival is less than `min_seconds`
        ago."""
        self._drop_old_arrivals(now)
        if not self._arrivals or now - self._arrivals[0][0] < min_seconds:
            return None
        return self._window_bytes / (now - self._arrivals[0][0])

    def is_below(self, limit: float, now: float) -> bool:
        """Whether bytes arrive more slowly than `limit`, and have for at least half a second."""
        rate = self.bytes_per_second(now, _SURE_SECONDS)
        return rate is not None and rate < limit


class PeakThroughput:
    """The best rate of a second in the last PEAK_LIFETIME seconds: what a network can do, if not always does."""

    def __init__(self) -> None:
        self._throughput = Throughput()
        self._peaks: deque[tuple[float, float]] = deque()
        """(time, rate), rates falling: the first is the peak, the others succeed it as it gets too old."""

    def add_arrival(self, now: float, length: int) -> None:
        """Count `length` bytes that arrived at `now`, which never goes back."""
        self._throughput.add_arrival(now, length)
        rate = self._throughput.bytes_per_second(now, _SURE_SECONDS)
        if rate is not None:
            while self._peaks and self._peaks[-1][1] <= rate:
                self._peaks.pop()
            if not self._peaks or now - self._peaks[-1][0] > _WINDOW_SECONDS:
                self._peaks.append((now, rate))

    def bytes_per_second(self, now: float) -> float | None:
        """The peak; None: bytes never arrived for half a second on end, or not lately."""
        while self._peaks and self._peaks[0][0] < now - PEAK_LIFETIME:
            self._peaks.popleft()
        return self._peaks[0][1] if self._peaks else None
