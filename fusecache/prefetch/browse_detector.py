"""Models that somebody seems about to load: their config.json was read, and none of their weights yet. Pure; the caller
has the clock and the lock.

An engine reads the config many seconds before the first weight (vLLM on a CPU: 14 s, for imports and the start of its
processes), in which the network would be idle. But who lists models reads all their configs and loads none: when more
than a few are announced at a time, nothing is fetched for any of them.
"""

from __future__ import annotations

_MAX_ANNOUNCED = 8
"""Models that a node starts to load at the same moment: one per accelerator."""
_ANNOUNCEMENT_SECONDS = 60.0
"""Seconds after which an announcement is forgotten."""


class BrowseDetector:
    """The folders that were announced lately. More than `most` at a time are too many."""

    def __init__(self, max_announced: int = _MAX_ANNOUNCED) -> None:
        self._max_announced = max_announced
        self._announced_at: dict[str, float] = {}

    def announce_folder(self, folder: str, now: float) -> list[str]:
        """The config of this folder was read; returns the folders that are not to be fetched for now, itself among
        them: there are too many."""
        self._announced_at = {
            known: since for known, since in self._announced_at.items() if now - since < _ANNOUNCEMENT_SECONDS
        }
        self._announced_at.setdefault(folder, now)
        return list(self._announced_at) if len(self._announced_at) > self._max_announced else []

    def weights_read(self, folder: str) -> None:
        """Weights of this folder are being read."""
        self._announced_at.pop(folder, None)
