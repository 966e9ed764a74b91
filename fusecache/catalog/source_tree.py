"""The tree of one source, and what happens when another takes its place."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from fusecache.catalog.entry import CatalogSource, Entry
from fusecache.catalog.index import EntryIndex
from fusecache.catalog.retained import RetainedNodes
from fusecache.catalog.tree import Tree, build_tree, find_changed_names
from fusecache.events import ChangedNames, Event
from fusecache.types import ObjectVersion


class SourceTree:
    """Replaces the tree of `source` in `index`. The event loop replaces; `build` and reading `current` are for any
    thread.

    `is_unsaved` is true from `mark_unsaved` on, until `take_unsaved`: the tree has changes that the saved listing
    lacks.
    """

    def __init__(
        self,
        source: CatalogSource,
        index: EntryIndex,
        retained: RetainedNodes,
        names_changed: Event[[ChangedNames]],
    ) -> None:
        self.source = source
        self._index = index
        self._retained = retained
        self._names_changed = names_changed
        self._is_taken = functools.partial(index.is_taken_elsewhere, source.name)
        self._is_unsaved = False

    @property
    def current(self) -> Tree:
        """The tree that is served now."""
        return self._index.tree_of(self.source.name)

    def has_entry(self, entry: Entry) -> bool:
        """Whether this very entry is in the tree that is served now."""
        return self.current.entries_by_id.get(entry.nodeid) is entry

    def build(self, versions: Sequence[ObjectVersion], before: Tree | None = None) -> Tree:
        """The tree of a listing; `before` lends the entries that are still right. Takes long for many objects: for
        worker threads."""
        return build_tree(
            self.source.name,
            versions,
            before=before,
            is_taken=self._is_taken,
            empty_mtime_ns=self._index.born_ns,
        )

    def replace(self, after: Tree, changes: ChangedNames | None = None) -> bool:
        """Serve `after` and publish what changed, which `changes` names if it is known; returns whether anything
        did."""
        before = self.current
        if changes is None:
            changes = find_changed_names(before, after)
        self._retained.detach_missing(before, after)
        self._index.replace_tree(self.source.name, after)
        if changes:
            self._retained.drop_reattached()
            self._names_changed.publish(changes)
        return bool(changes)

    def replace_version(self, entry: Entry, version: ObjectVersion | None) -> None:
        """Serve another version of one file that is in the tree, or the tree without it (None). Cheap enough for the
        event loop: 5 ms at 100,000 objects."""
        self._is_unsaved = True
        self.replace(
            self.current.replace_version(entry, version, self._is_taken), [(entry.parent, entry.name)]
        )

    def mark_unsaved(self) -> None:
        """Note that the tree has changes that the saved listing lacks."""
        self._is_unsaved = True

    def take_unsaved(self) -> bool:
        """Whether the tree has changes that the saved listing lacks; the caller saves them."""
        was_unsaved, self._is_unsaved = self._is_unsaved, False
        return was_unsaved
