"""Opens that were answered ESTALE: the VFS comes back once, and must not be answered so again (see handles.py)."""

from __future__ import annotations

import time

STALE_RETRY_SECONDS = 2.0
"""Seconds within which the VFS comes back after ESTALE."""
_MAX_TRACKED_OPENS = 10_000


class StaleRetryTracker:
    """Whose opens they were. Of the event loop."""

    def __init__(self) -> None:
        self._stale_answer_times: dict[tuple[str | None, int], float] = {}
        """Path (None: not known) and thread -> when. Threads of other pid namespaces, a container's, are all 0."""

    def record_stale_answer(self, path: str | None, tid: int) -> None:
        """The open of this path, None: which is not known, by this thread is answered ESTALE."""
        self._stale_answer_times[path, tid] = time.monotonic()
        while len(self._stale_answer_times) > _MAX_TRACKED_OPENS:
            del self._stale_answer_times[next(iter(self._stale_answer_times))]

    def is_retry(self, path: str | None, tid: int) -> bool:
        """Whether this thread's open of this path was answered so just before."""
        last = max(self._stale_answer_times.get((known, tid), -STALE_RETRY_SECONDS) for known in (path, None))
        return time.monotonic() - last < STALE_RETRY_SECONDS
