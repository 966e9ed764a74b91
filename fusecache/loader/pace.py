"""How fast bytes arrive, over the last second. Pure; the caller has the clock and the lock."""

from __future__ import annotations

from collections import deque

_WINDOW = 1.0
_LEAST = 0.1
"""Seconds of arrivals before a pace is worth telling: the first connections are just starting up."""
_SURE = 0.5
"""Seconds of arrivals after which a pace that is slow is not just the beginning."""


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

    def per_second(self, now: float) -> float | None:
        """The pace; None: nothing arrived lately, or not for long enough."""
        self._forget(now)
        if not self._arrivals or now - self._arrivals[0][0] < _LEAST:
            return None
        return self._total / (now - self._arrivals[0][0])

    def is_below(self, limit: float, now: float) -> bool:
        """Whether bytes arrive, and have for a while, more slowly than this."""
        pace = self.per_second(now)
        return pace is not None and pace < limit and now - self._arrivals[0][0] >= _SURE
