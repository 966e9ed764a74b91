"""How long an open waits for its file to be whole. Pure; the caller has the clock."""

from __future__ import annotations

import math

_DOUBT_SECONDS = 0.5
"""Seconds for which the end must look too far away before it is believed. The pace of a network is no better known
sooner: its first connections are still growing, or it just paused, and then every open of that moment would be answered
too early, and its file read through the daemon to its end."""


class OpenWaitPolicy:
    """One open that began at `started` and waits `limit` seconds in all, give or take half a one."""

    def __init__(self, limit_seconds: float, started_at: float) -> None:
        self._limit_seconds = limit_seconds
        self._started_at = started_at
        self._doubtful_since: float | None = None

    def check_wait_over(self, now: float, seconds_left: float | None) -> bool:
        """Whether to wait no longer, when the rest takes `left` more seconds: infinity if it does not come at all, None
        if nobody knows."""
        if seconds_left == math.inf:
            return True
        if now - self._started_at + (seconds_left or 0.0) <= self._limit_seconds:
            self._doubtful_since = None
            return False
        if self._doubtful_since is None:
            self._doubtful_since = now
        return now - self._doubtful_since >= _DOUBT_SECONDS
