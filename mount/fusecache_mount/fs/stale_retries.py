"""Opens that were answered ESTALE: the VFS comes back once, and must not be answered so again, or open(2) fails."""

from __future__ import annotations

from fusecache.bounded import BoundedDict

STALE_RETRY_SECONDS = 2.0
"""Seconds within which the VFS comes back after ESTALE."""
_MAX_TRACKED_OPENS = 10_000


class StaleRetryTracker:
    """The threads whose opens were answered ESTALE. Of the event loop.

    | An open of a path by a thread | By | It is |
    |---|---|---|
    | new | `record_stale_answer` | expected back |
    | expected back | STALE_RETRY_SECONDS pass, or too many others came after it | new |
    """

    def __init__(self) -> None:
        self._expected_back: BoundedDict[tuple[str | None, int], None] = BoundedDict(
            _MAX_TRACKED_OPENS, max_age=STALE_RETRY_SECONDS
        )
        """Path (None: not known) and thread. Threads of other pid namespaces, a container's, are all 0."""

    def record_stale_answer(self, path: str | None, tid: int) -> None:
        """The open of this path (None: it is not known) by this thread is answered ESTALE."""
        self._expected_back[path, tid] = None

    def is_retry(self, path: str | None, tid: int) -> bool:
        """Whether this thread's open of this path was answered so just before."""
        return (path, tid) in self._expected_back or (None, tid) in self._expected_back
