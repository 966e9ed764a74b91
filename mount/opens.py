"""What is known of an open file, and how many there were. Plain data, of Handles."""

from __future__ import annotations

from dataclasses import dataclass

from fusecache.loader.load import ObjectLoad
from fusecache.store.object import StoredObject
from fusecache.types import ObjectVersion


@dataclass
class OpenFile:
    """A nodeid with opens, or a twin made ready for one that is about to come (`count` 0)."""

    nodeid: int
    version: ObjectVersion
    source: str
    load: ObjectLoad | None
    stored: StoredObject | None
    backing: int = 0
    count: int = 0
    since: float = 0.0
    entered: bool = False
    """The loader was told that somebody opened it, and is to be told when the last one left."""
    followed: bool = False
    """What is to be done after the first open was done, or nobody has it open any more. Of the chores thread."""


@dataclass
class OpenStats:
    """Opens since the start of this daemon."""

    passthrough: int = 0
    daemon: int = 0
    bounced: int = 0
