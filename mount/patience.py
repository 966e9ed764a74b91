"""How long an open waits for its file to be whole. Pure; the caller has the clock."""

from __future__ import annotations

import math

_SURE = 0.5
"""Seconds for which the end must look too far away before it is believed. The pace of a network is no better known
sooner: its first connections are still growing, or it just paused, and then every open of that moment would be answered
too early, and its file read through the daemon to its end."""


class Patience:
    """One open that began at `started` and waits `limit` seconds in all, give or take half a one."""

    def __init__(self, limit: float, started: float) -> None:
        self._limit = limit
        self._started = started
        self._doubtful: float | None = None

    def ends(self, now: float, left: float | None) -> bool:
        """Whether to wait no longer, when the rest takes `left` more seconds: infinity if it does not come at all, None
        if nobody knows."""
        if left == math.inf:
            return True
        if now - self._started + (left or 0.0) <= self._limit:
            self._doubtful = None
            return False
        if self._doubtful is None:
            self._doubtful = now
        return now - self._doubtful >= _SURE
