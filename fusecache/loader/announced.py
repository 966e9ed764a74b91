"""Models that somebody seems about to load: their config.json was read, and none of their weights yet. Pure; the caller
has the clock and the lock.

An engine reads the config many seconds before the first weight (vLLM on a CPU: 14 s, for imports and the start of its
processes), in which the network would be idle. But who lists models reads all their configs and loads none: when more
than a few are announced at a time, nothing is fetched for any of them.
"""

from __future__ import annotations

_MOST = 8
"""Models that a node starts to load at the same moment: one per accelerator."""
_AGE = 60.0
"""Seconds after which an announcement is forgotten."""


class Announced:
    """The folders that were announced lately. More than `most` at a time are too many."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._since: dict[str, float] = {}

    def add(self, folder: str, now: float) -> list[str]:
        """The config of this folder was read; returns the folders that are not to be fetched for now, itself among
        them: there are too many."""
        self._since = {known: since for known, since in self._since.items() if now - since < _AGE}
        self._since.setdefault(folder, now)
        return list(self._since) if len(self._since) > self._most else []

    def loaded(self, folder: str) -> None:
        """Weights of this folder are being read."""
        self._since.pop(folder, None)
