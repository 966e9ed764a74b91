"""What is known of an open file, and how many there were. Plain data, of Handles."""

from __future__ import annotations

from dataclasses import dataclass

from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.store.object import StoredObject
from fusecache.types import ObjectVersion


@dataclass
class OpenFile:
    """A nodeid with opens, or a twin made ready for one that is about to come (`count` 0)."""

    nodeid: int
    version: ObjectVersion
    source: str
    object_fetch: ObjectFetch | None
    stored: StoredObject | None
    backing_id: int = 0
    open_count: int = 0
    prepared_at: float = 0.0
    is_open_reported: bool = False
    """The loader was told that somebody opened it, and is to be told when the last one left."""
    is_follow_up_done: bool = False
    """What is to be done after the first open was done, or nobody has it open any more. Of the chores thread."""


@dataclass
class OpenStats:
    """Opens since the start of this daemon."""

    passthrough_opens: int = 0
    daemon_opens: int = 0
    stale_answers: int = 0
