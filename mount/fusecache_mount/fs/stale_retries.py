"""Opens that were answered ESTALE: the VFS comes back once, and must not be answered so again (see handles.py)."""

from __future__ import annotations

from fusecache.bounded import BoundedDict

STALE_RETRY_SECONDS = 2.0
"""Seconds within which the VFS comes back after ESTALE."""
_MAX_TRACKED_OPENS = 10_000


class StaleRetryTracker:
    """Whose opens they were. Of the event loop."""

    def __init__(self) -> None:
        self._stale_answers: BoundedDict[tuple[str | None, int], None] = BoundedDict(
            _MAX_TRACKED_OPENS, max_age=STALE_RETRY_SECONDS
        )
        """Path (None: not known) and thread. Threads of other pid namespaces, a container's, are all 0."""

    def record_stale_answer(self, path: str | None, tid: int) -> None:
        """The open of this path, None: which is not known, by this thread is answered ESTALE."""
        self._stale_answers[path, tid] = None

    def is_retry(self, path: str | None, tid: int) -> bool:
        """Whether this thread's open of this path was answered so just before."""
        return any((known, tid) in self._stale_answers for known in (path, None))
