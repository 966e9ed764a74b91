"""Opens that were answered ESTALE: the VFS comes back once, and must not be answered so again (see handles.py)."""

from __future__ import annotations

import time

BOUNCE = 2.0
"""Seconds within which the VFS comes back after ESTALE."""
_KNOWN = 10_000


class Bounces:
    """Whose opens they were. Of the event loop."""

    def __init__(self) -> None:
        self._since: dict[tuple[str | None, int], float] = {}
        """Path (None: not known) and thread -> when. Threads of other pid namespaces, a container's, are all 0."""

    def add(self, path: str | None, thread: int) -> None:
        """The open of this path, None: which is not known, by this thread is answered ESTALE."""
        self._since[path, thread] = time.monotonic()
        while len(self._since) > _KNOWN:
            del self._since[next(iter(self._since))]

    def comes_again(self, path: str | None, thread: int) -> bool:
        """Whether this thread's open of this path was answered so just before."""
        last = max(self._since.get((known, thread), -BOUNCE) for known in (path, None))
        return time.monotonic() - last < BOUNCE
