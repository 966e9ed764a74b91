"""Has fetched what comes along with a file that is read for the first time: the rest of its adapter, or small weights.

A program that loads an adapter reads its configuration, and the weights right after. But a program that looks through a
folder of thousands reads all their configurations and loads none: when the weights of too many were begun and never
read, nothing is fetched for any of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from fusecache.bounded import BoundedDict
from fusecache.prefetch.browse_detector import BrowseDetector
from fusecache.prefetch.interface import CatalogView
from fusecache.prefetch.models.companions import companions_of
from fusecache.prefetch.models.shard_order import folder_of, is_shard
from fusecache.types import ObjectId, ObjectVersion

_COMPANION_INTERVAL = 60.0
"""Seconds before another first read of a file looks again for its companions."""
_MAX_CHECKED_FILES = 10_000
_MAX_ADAPTERS = 32
"""Adapters that are begun at the same moment: as many as a server's workers would load."""
_MAX_FOLDER_FILES = 4096
"""Files of a folder that is no model or adapter, but a collection."""


class CompanionPrefetcher:
    """Asks `catalog` what is beside a file; `start_file(version, source)` has a whole file fetched. Thread-safe; its
    lock is a leaf."""

    def __init__(self, catalog: CatalogView, start_file: Callable[[ObjectVersion, str], None]) -> None:
        self._catalog = catalog
        self._start_file = start_file
        self._lock = threading.Lock()
        self._checked: BoundedDict[ObjectId, None] = BoundedDict(
            _MAX_CHECKED_FILES, max_age=_COMPANION_INTERVAL
        )
        self._browse_detector = BrowseDetector(_MAX_ADAPTERS)

    def mark_if_due(self, version: ObjectVersion) -> bool:
        """A file is being read; returns whether `prefetch_companions` is to be called, soon. Does not block."""
        with self._lock:
            if is_shard(version.key):
                self._browse_detector.weights_read(folder_of(version))
            if version.id in self._checked:
                return False
            self._checked[version.id] = None
            return True

    def prefetch_companions(self, version: ObjectVersion, source: str) -> None:
        """Have the files that come along with this one fetched. Does disk I/O."""
        found = companion_versions(version, self._catalog.siblings(version))
        if found and not is_shard(version.key):
            with self._lock:
                if self._browse_detector.announce_folder(folder_of(version), time.monotonic()):
                    return
        for other in found:
            self._start_file(other, source)


def companion_versions(version: ObjectVersion, siblings: Sequence[ObjectVersion]) -> list[ObjectVersion]:
    """The versions that are read together with this one, of those in its folder."""
    if len(siblings) > _MAX_FOLDER_FILES:
        return []
    folder, _, name = version.key.rpartition("/")
    start = len(folder) + 1 if folder else 0
    versions = {other.key[start:]: other for other in siblings if other.key.rpartition("/")[0] == folder}
    return [
        versions[found] for found in companions_of(name, {key: each.size for key, each in versions.items()})
    ]
