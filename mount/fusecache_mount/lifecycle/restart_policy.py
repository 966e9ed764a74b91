"""When a daemon that ended unasked is started again. Pure; standard library only."""

from __future__ import annotations

from collections import deque

MAX_RESTARTS = 5
RESTART_WINDOW = 60.0
"""Seconds."""
_PAUSES = (0.05, 0.2, 0.5, 1.0, 2.0)
"""Seconds before the first, second ... restart within the window."""


class RestartPolicy:
    """Counts the crashes of a daemon: at most MAX_RESTARTS restarts within RESTART_WINDOW. `backoff` is a factor of the
    pauses. Times are in seconds, by any clock that does not jump."""

    def __init__(self, backoff: float = 1.0) -> None:
        self._backoff = backoff
        self._crash_times: deque[float] = deque(maxlen=MAX_RESTARTS)
        self._crash_count = 0

    @property
    def crash_count(self) -> int:
        """Crashes since the mount was made."""
        return self._crash_count

    def record_crash(self, now: float) -> float | None:
        """Count a crash; returns the seconds to wait before the restart, None when it is one too many."""
        self._crash_count += 1
        if len(self._crash_times) == MAX_RESTARTS and now - self._crash_times[0] < RESTART_WINDOW:
            return None
        recent = sum(now - then < RESTART_WINDOW for then in self._crash_times)
        self._crash_times.append(now)
        return _PAUSES[min(recent, len(_PAUSES) - 1)] * self._backoff
