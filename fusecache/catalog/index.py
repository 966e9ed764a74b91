"""The present tree of a mount, in memory: names, attributes and versions of the objects of all sources.

Every method reads immutable trees: it never blocks, takes no lock and may be called from any thread, but for
`replace_tree`. Two calls may see two trees, when a refresh comes in between.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence

from fusecache.catalog.entry import ROOT, CatalogSource, Entry
from fusecache.catalog.tree import FIRST_CURSOR, Tree, build_tree
from fusecache.types import ObjectVersion


class EntryIndex:
    """One source at the root of the mount, or several as directories below it: each has a tree, empty at first.

    The event loop replaces trees; the other threads only read.
    """

    def __init__(self, sources: Sequence[CatalogSource]) -> None:
        """The names of `sources` are all different."""
        self.born_ns = time.time_ns()
        """Modification time of directories without an object below them."""
        self.shared_root: Entry | None = None
        """The root directory when several sources share it; it belongs to none of them."""
        if all(source.name for source in sources):
            self.shared_root = Entry(ROOT, ROOT, b"", "", True, None, "", 0, self.born_ns)
        self._source_names = {source.identity: source.name for source in sources}
        self._trees: dict[str, Tree] = {}
        for source in sources:
            self._trees[source.name] = build_tree(
                source.name,
                (),
                is_taken=functools.partial(self.is_taken_elsewhere, source.name),
                empty_mtime_ns=self.born_ns,
            )

    # -- trees

    def tree_of(self, source: str) -> Tree:
        """The tree of a source that is served now."""
        return self._trees[source]

    def replace_tree(self, source: str, tree: Tree) -> None:
        """Serve this tree of a source from now on. On the event loop only."""
        self._trees[source] = tree

    def is_taken_elsewhere(self, source: str, nodeid: int) -> bool:
        """Whether the tree of another source than this has the nodeid."""
        return any(nodeid in tree.entries_by_id for name, tree in self._trees.items() if name != source)

    # -- entries

    def current_entry(self, nodeid: int) -> Entry | None:
        """The entry with this nodeid, if it is in a tree."""
        if nodeid == ROOT and self.shared_root is not None:
            return self.shared_root
        for tree in self._trees.values():
            if (entry := tree.entries_by_id.get(nodeid)) is not None:
                return entry
        return None

    def is_current(self, nodeid: int) -> bool:
        """Whether this nodeid is in a tree."""
        return self.current_entry(nodeid) is not None

    def lookup(self, parent: int, name: bytes) -> Entry | None:
        """The child of a directory by its name."""
        if self._is_shared_root(parent):
            return next((entry for entry in self.children(ROOT) if entry.name == name), None)
        for tree in self._trees.values():
            if (entry := tree.lookup(parent, name)) is not None:
                return entry
        return None

    def entry_by_path(self, path: str) -> Entry | None:
        """The entry at a path relative to the mountpoint ('' is the root)."""
        entry = self.current_entry(ROOT)
        for part in path.split("/") if path else ():
            if entry is None:
                return None
            try:
                entry = self.lookup(entry.nodeid, part.encode("utf-8", "surrogateescape"))
            except UnicodeEncodeError:
                return None
        return entry

    # -- directories

    def children(self, nodeid: int) -> Sequence[Entry]:
        """The entries of a directory, sorted by name; none if the nodeid is no directory of a tree."""
        if self._is_shared_root(nodeid):
            return sorted((tree.root for tree in self._trees.values()), key=lambda each: each.name)
        for tree in self._trees.values():
            if (found := tree.children_by_id.get(nodeid)) is not None:
                return found
        return ()

    def scan_directory(self, nodeid: int, cursor: int) -> Iterator[tuple[int, Entry]]:
        """The children of a directory behind a directory offset, each with its own offset (>= 3).

        Offsets are hashes of names: a scan that goes on after a refresh, or after a restart, meets each name that was
        there all the time exactly once.
        """
        if self._is_shared_root(nodeid):
            # sources don't change during a mount
            yield from (each for each in enumerate(self.children(ROOT), FIRST_CURSOR) if each[0] > cursor)
            return
        for tree in self._trees.values():
            if nodeid in tree.children_by_id:
                yield from tree.scan_directory(nodeid, cursor)
                return

    def walk_entries(self) -> Iterator[Entry]:
        """All entries below the root, depth first."""
        for name in sorted(self._trees):
            tree = self._trees[name]
            if self.shared_root is not None:
                yield tree.root
            yield from tree.walk_entries()

    @property
    def totals(self) -> tuple[int, int]:
        """Number of files, and the sum of their sizes in bytes."""
        trees = list(self._trees.values())
        return sum(tree.file_count for tree in trees), sum(tree.total_bytes for tree in trees)

    def _is_shared_root(self, nodeid: int) -> bool:
        return nodeid == ROOT and self.shared_root is not None

    # -- objects

    def entry_of_version(self, version: ObjectVersion) -> Entry | None:
        """The file that shows this version, if the tree has just this one."""
        entry = self._entry_of_key(version, version.key)
        return entry if entry is not None and entry.version == version else None

    def siblings(self, version: ObjectVersion) -> Sequence[ObjectVersion]:
        """The versions of the files in the folder of this object, itself included; just `version` when nothing is at
        its path."""
        entry = self._entry_of_key(version, version.key)
        if entry is None:
            return [version]
        return [other.version for other in self.children(entry.parent) if other.version is not None]

    def find_object(self, version: ObjectVersion, key: str) -> ObjectVersion | None:
        """The version of the object `key` of the source that `version` comes from, if the tree has one."""
        entry = self._entry_of_key(version, key)
        return None if entry is None else entry.version

    def _entry_of_key(self, version: ObjectVersion, key: str) -> Entry | None:
        source = self._source_names.get(version.origin, "")
        return self.entry_by_path(f"{source}/{key}" if source else key)
