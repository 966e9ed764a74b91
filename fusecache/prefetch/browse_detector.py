"""Models that seem about to be loaded: their config.json was read, and none of their weights yet. Pure; the caller has
the clock and the lock.

An engine reads the config many seconds before the first weight (vLLM on a CPU: 14 s, for imports and the start of its
processes), in which the network would be idle. But a program that lists models reads all their configs and loads none:
when more than a few are announced at a time, nothing is fetched for any of them.
"""

from __future__ import annotations

_MAX_ANNOUNCED = 8
"""Models that a node starts to load at the same moment: one per accelerator."""
_ANNOUNCEMENT_SECONDS = 60.0
"""Seconds after which an announcement is forgotten."""


class BrowseDetector:
    """The folders that were announced lately: more than `max_announced` at a time are too many.

    | Folder | Event | Next state |
    |---|---|---|
    | unknown | `announce_folder` | announced |
    | announced | `weights_read`, or 60 s have passed | unknown |
    """

    def __init__(self, max_announced: int = _MAX_ANNOUNCED) -> None:
        self._max_announced = max_announced
        self._announced_at: dict[str, float] = {}

    def announce_folder(self, folder: str, now: float) -> list[str]:
        """The config of this folder was read; returns the folders for which nothing is to be fetched for now, itself
        among them, because there are too many; [] otherwise."""
        self._forget_old(now)
        self._announced_at.setdefault(folder, now)
        return list(self._announced_at) if self.is_browsed(now) else []

    def is_browsed(self, now: float) -> bool:
        """Whether too many folders are announced: their models are listed, and not loaded."""
        self._forget_old(now)
        return len(self._announced_at) > self._max_announced

    def weights_read(self, folder: str) -> None:
        """Weights of this folder are being read."""
        self._announced_at.pop(folder, None)

    def _forget_old(self, now: float) -> None:
        self._announced_at = {
            known: since for known, since in self._announced_at.items() if now - since < _ANNOUNCEMENT_SECONDS
        }
