"""Which nodeids are open, how often, and as which version.

A file has two nodeids. The daemon serves the reads of its base, from the store or while the blocks arrive; its
passthrough nodeid (bit 62 set) is opened with FUSE passthrough, when all of the file is in the store and verified, and
the kernel reads the data file itself. The table knows these states of a nodeid:

| State | Base | Passthrough nodeid |
|---|---|---|
| absent | nobody has it open | nobody has it open, and it is not prepared |
| prepared (`open_count` 0) | never | it has its backing; an open that was answered ESTALE is about to come back to it |
| open (`open_count` > 0) | its `object_fetch` is open | its `stored` is open, the kernel holds its backing |
| inherited | open in the kernel since before this daemon started | the same; the kernel reads on by itself |

| From | By | To |
|---|---|---|
| absent | `count_daemon_open` | open |
| absent | `add` of a file with a backing and no opens | prepared |
| prepared, open | `join_passthrough_open` | open, once more |
| prepared for STALE_RETRY_SECONDS | `drop_unopened` | absent; the caller gives back what it held |
| inherited | `take_inherited`, then `add` | open, as often as the journal says |
| open, inherited | `release` | open once less; absent after the last one |
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.locking import OwnedLock
from fusecache.store.object import StoredObject
from fusecache.types import ObjectVersion
from fusecache_mount.fs.journal import OpenFileJournal, OpenRecord
from fusecache_mount.fs.stale_retries import STALE_RETRY_SECONDS
from fusecache_mount.kernel.nodeids import is_passthrough


@dataclass
class OpenFile:
    """A nodeid with opens, or a passthrough nodeid that was prepared for one that is about to come (`open_count` 0)."""

    nodeid: int
    version: ObjectVersion
    source: str
    object_fetch: ObjectFetch | None
    stored: StoredObject | None
    backing_id: int = 0
    open_count: int = 0
    prepared_at: float = 0.0
    is_open_reported: bool = False
    """The observer of reads was told that somebody opened it, and is to be told when the last one closes it."""
    is_follow_up_done: bool = False
    """The first open was followed up, or nobody has it open any more. Of the background thread."""


@dataclass
class OpenStats:
    """Opens since the start of this daemon."""

    passthrough_opens: int = 0
    daemon_opens: int = 0


@dataclass(frozen=True)
class LastRelease:
    """The resources that the last release of a nodeid leaves to give back: a file, or the backing of an inherited
    one."""

    file: OpenFile | None = None
    backing_id: int = 0


class OpenFileTable:
    """The nodeids that are open. `_lock` guards the table and its counts; nothing blocks under it, so that the event
    loop may take it. `get` and `is_inherited` read without it (single dict operations). An open joins what is in the
    table under `_lock`: the last release may take it out at any moment."""

    def __init__(self, journal: OpenFileJournal) -> None:
        self.stats = OpenStats()
        self._journal = journal
        self._lock = OwnedLock()
        self._files: dict[int, OpenFile] = {}
        self._inherited_opens: dict[int, OpenRecord] = dict(journal.inherited_opens)

    def get(self, nodeid: int) -> OpenFile | None:
        """The file that is open, or prepared, as this nodeid."""
        return self._files.get(nodeid)

    def is_inherited(self, nodeid: int) -> bool:
        """Whether this nodeid is open since before this daemon started, and was not taken over yet."""
        return nodeid in self._inherited_opens

    def count_open_nodeids(self) -> tuple[int, int]:
        """Nodeids that are open: with passthrough, and through the daemon."""
        with self._lock:
            nodeids = [file.nodeid for file in self._files.values() if file.open_count]
            nodeids += [nodeid for nodeid in self._inherited_opens if nodeid not in self._files]
        passed = sum(map(is_passthrough, nodeids))
        return passed, len(nodeids) - passed

    def join_passthrough_open(self, nodeid: int, *, must_have_backing: bool = False) -> OpenFile | None:
        """One more open of a passthrough nodeid that is in the table; None: it is not, or has no backing though
        `must_have_backing`."""
        with self._lock:
            file = self._files.get(nodeid)
            if file is None or (must_have_backing and not file.backing_id):
                return None
            file.open_count += 1
            self.stats.passthrough_opens += 1
        return file

    def count_daemon_open(self, file: OpenFile) -> bool:
        """One more open of a base, which enters the table if it was not there. Returns whether it is the first."""
        with self._lock:
            file.open_count += 1
            self._files[file.nodeid] = file
            self.stats.daemon_opens += 1
            return file.open_count == 1

    def add(self, file: OpenFile) -> None:
        """Enter a file that was prepared, or taken over with its opens."""
        with self._lock:
            self._files[file.nodeid] = file

    def take_inherited(self, nodeid: int) -> OpenRecord | None:
        """Take a nodeid out of the inherited ones; returns what the journal says of it, None if it was none."""
        with self._lock:
            return self._inherited_opens.pop(nodeid, None)

    def release(self, nodeid: int) -> LastRelease | None:
        """One open less. None: others have it open still, or nobody had."""
        with self._lock:
            file = self._files.get(nodeid)
            if file is not None:
                file.open_count -= 1
                if file.open_count > 0:
                    return None
                del self._files[nodeid]
                return LastRelease(file)
            record = self._inherited_opens.get(nodeid)
            if record is None:
                return None
            record.open_count -= 1
            if record.open_count > 0:
                return None
            del self._inherited_opens[nodeid]
            return LastRelease(backing_id=record.backing_id)

    def drop_unopened(self) -> list[OpenFile]:
        """Take out the passthrough nodeids that were prepared so long ago that no open comes back to them. The caller
        gives back what they held."""
        now = time.monotonic()
        with self._lock:
            dropped = [
                file
                for file in self._files.values()
                if file.open_count == 0
                and is_passthrough(file.nodeid)
                and now - file.prepared_at >= STALE_RETRY_SECONDS
            ]
            for file in dropped:
                del self._files[file.nodeid]
        return dropped

    def clear(self) -> list[OpenFile]:
        """Take out all; the caller gives back what they held. The kernel's own handles go on by themselves."""
        with self._lock:
            files = list(self._files.values())
            self._files.clear()
        return files

    def record_open(self, file: OpenFile) -> None:
        """Have the journal know of one more open, before it is answered. Writes to a tmpfs under the journal's lock."""
        self._journal.record_open(file.nodeid, file.version, file.source, file.backing_id)

    def record_release(self, nodeid: int) -> None:
        """Have the journal know of one open less. Writes to a tmpfs, under the journal's lock."""
        self._journal.record_release(nodeid)
