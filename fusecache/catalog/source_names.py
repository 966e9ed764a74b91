"""Which source an object version is of, and its path in the tree. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from fusecache.types import ObjectVersion


class SourceNames:
    """The names of the sources of a node, by the identity of their origin. Immutable."""

    def __init__(self, name_by_identity: Mapping[str, str]) -> None:
        self._names = dict(name_by_identity)

    def source_of(self, version: ObjectVersion) -> str | None:
        """The name of the source of a version, '' for the only one; None when no source of this node has it."""
        return self._names.get(version.origin)

    def tree_path(self, version: ObjectVersion) -> str | None:
        """The path of a version below the root of the tree; None when no source of this node has it."""
        source = self.source_of(version)
        if source is None:
            return None
        return f"{source}/{version.key}" if source else version.key
