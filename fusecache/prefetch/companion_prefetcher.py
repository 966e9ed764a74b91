"""Fetches what comes along with a file that somebody begins to read: the rest of its adapter, see companions.py.

Who loads an adapter reads its configuration, and the weights right after. But who looks through a folder of thousands
reads all their configurations and loads none: when many are begun at a time whose weights nobody reads, nothing is
fetched for any of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from fusecache.bounded import BoundedDict
from fusecache.fetch.interface import CatalogView
from fusecache.prefetch.browse_detector import BrowseDetector
from fusecache.prefetch.models.companions import WEIGHT_SUFFIXES, companions_of
from fusecache.types import ObjectId, ObjectVersion

_COMPANION_INTERVAL = 60.0
"""Seconds before another first read of a file looks again for its companions."""
_MAX_CHECKED_FILES = 10_000
_MAX_ADAPTERS = 32
"""Adapters that are begun at the same moment: as many as a server's workers would load."""
_MAX_FOLDER_FILES = 4096
"""Files of a folder that is no model or adapter, but a collection."""


class CompanionPrefetcher:
    """Asks `library` what is beside a file; `begin(version, source)` fetches a whole file. Thread-safe."""

    def __init__(self, catalog: CatalogView, start_file: Callable[[ObjectVersion, str], None]) -> None:
        self._catalog = catalog
        self._start_file = start_file
        self._lock = threading.Lock()
        self._checked: BoundedDict[ObjectId, None] = BoundedDict(
            _MAX_CHECKED_FILES, max_age=_COMPANION_INTERVAL
        )
        self._browse_detector = BrowseDetector(_MAX_ADAPTERS)

    def mark_if_due(self, version: ObjectVersion) -> bool:
        """A file is being read; whether `fetch` is to be called, soon. Does not block."""
        with self._lock:
            if _is_weights(version):
                self._browse_detector.weights_read(_folder_of(version))
            if version.id in self._checked:
                return False
            self._checked[version.id] = None
            return True

    def prefetch_companions(self, version: ObjectVersion, source: str) -> None:
        """Begin with the files that come along with this one. May take milliseconds."""
        found = companion_versions(version, self._catalog.siblings(version))
        if found and not _is_weights(version):
            with self._lock:
                if self._browse_detector.announce_folder(_folder_of(version), time.monotonic()):
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


def _is_weights(version: ObjectVersion) -> bool:
    return version.key.lower().endswith(WEIGHT_SUFFIXES)


def _folder_of(version: ObjectVersion) -> str:
    return f"{version.origin}/{version.key.rpartition('/')[0]}"
