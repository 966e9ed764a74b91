"""The nodeids that must go on to be resolvable, because the kernel knows them or a handle has them open."""

from __future__ import annotations

from fusecache.catalog.entry import Entry
from fusecache.catalog.index import EntryIndex
from fusecache.catalog.tree import Tree
from fusecache.types import NodeId


class RetainedNodes:
    """Counts the uses of each nodeid, and keeps the entries that are used and no longer in a tree (detached).

    | What happens | The entry |
    |---|---|
    | `retain_nodeid`, for the first time | is retained |
    | a refresh takes it out of the tree while it is retained | is detached: found by its nodeid, in no directory |
    | a refresh brings its nodeid back | is found in the tree again |
    | its count falls to 0 | is forgotten, if it is detached |

    The event loop alone changes the counts and the entries. Other threads may call `entry_by_nodeid`: it looks into the
    trees first and at the detached entries then, and an entry is added here before it leaves its tree, so that no
    thread finds it in neither.
    """

    def __init__(self, index: EntryIndex) -> None:
        self._index = index
        self._retain_counts: dict[int, int] = {}
        """nodeid -> lookups that the kernel has not forgotten, and open handles."""
        self._detached_entries: dict[int, Entry] = {}

    def entry_by_nodeid(self, nodeid: int) -> Entry | None:
        """The entry behind a nodeid, also when it is detached. From any thread."""
        return self._index.current_entry(nodeid) or self._detached_entries.get(nodeid)

    def retain_nodeid(self, nodeid: NodeId | int) -> None:
        """Count that the kernel, or a handle, knows this nodeid (once more). An unknown nodeid is ignored."""
        entry = self.entry_by_nodeid(nodeid)
        if entry is not None:
            # the number of the entry, not the caller's equal one: it costs no memory of its own
            self._retain_counts[entry.nodeid] = self._retain_counts.get(nodeid, 0) + 1

    def release_nodeid(self, nodeid: int, count: int = 1) -> None:
        """Take back `count` calls of `retain_nodeid`. More than there were are ignored: they are an earlier
        daemon's."""
        left = self._retain_counts.get(nodeid, 0) - count
        if left > 0:
            self._retain_counts[nodeid] = left
        else:
            self._retain_counts.pop(nodeid, None)
            self._detached_entries.pop(nodeid, None)

    def retained_entries(self) -> list[Entry]:
        """The entries that are retained, in a tree or detached."""
        found = [self.entry_by_nodeid(nodeid) for nodeid in list(self._retain_counts)]
        return [entry for entry in found if entry is not None]

    def detach_missing(self, before: Tree, after: Tree) -> None:
        """Keep the retained entries that are in `before` and not in `after`: call it before the tree is replaced."""
        for nodeid in before.entries_by_id.keys() - after.entries_by_id.keys():
            if nodeid in self._retain_counts:
                self._detached_entries[nodeid] = before.entries_by_id[nodeid]

    def drop_reattached(self) -> None:
        """Drop the detached entries whose nodeid is in a tree again: call it after a tree was replaced."""
        for nodeid in [each for each in self._detached_entries if self._index.is_current(each)]:
            del self._detached_entries[nodeid]
