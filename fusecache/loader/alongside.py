"""Fetches what comes along with a file that somebody begins to read: the rest of its adapter, see companions.py.

Who loads an adapter reads its configuration, and the weights right after. But who looks through a folder of thousands
reads all their configurations and loads none: when many are begun at a time whose weights nobody reads, nothing is
fetched for any of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from fusecache.loader.announced import Announced
from fusecache.loader.companions import SUFFIXES, companions
from fusecache.loader.interface import Library
from fusecache.types import ObjectId, ObjectVersion

_AGAIN = 60.0
"""Seconds before another first read of a file looks again for its companions."""
_KNOWN = 10_000
_MOST = 32
"""Adapters that are begun at the same moment: as many as a server's workers would load."""
_LARGE = 4096
"""Files of a folder that is no model or adapter, but a collection."""


class Alongside:
    """Asks `library` what is beside a file; `begin(version, source)` fetches a whole file. Thread-safe."""

    def __init__(self, library: Library, begin: Callable[[ObjectVersion, str], None]) -> None:
        self._library = library
        self._begin = begin
        self._lock = threading.Lock()
        self._asked: dict[ObjectId, float] = {}
        self._announced = Announced(_MOST)

    def due(self, version: ObjectVersion) -> bool:
        """A file is being read; whether `fetch` is to be called, soon. Does not block."""
        now = time.monotonic()
        with self._lock:
            if _is_weights(version):
                self._announced.loaded(_folder(version))
            if now - self._asked.get(version.id, -_AGAIN) < _AGAIN:
                return False
            self._asked[version.id] = now
            while len(self._asked) > _KNOWN:
                del self._asked[next(iter(self._asked))]
            return True

    def fetch(self, version: ObjectVersion, source: str) -> None:
        """Begin with the files that come along with this one. May take milliseconds."""
        found = files_along(version, self._library.siblings(version))
        if found and not _is_weights(version):
            with self._lock:
                if self._announced.add(_folder(version), time.monotonic()):
                    return
        for other in found:
            self._begin(other, source)


def files_along(version: ObjectVersion, siblings: Sequence[ObjectVersion]) -> list[ObjectVersion]:
    """The versions that are read together with this one, of those in its folder."""
    if len(siblings) > _LARGE:
        return []
    folder, _, name = version.key.rpartition("/")
    start = len(folder) + 1 if folder else 0
    versions = {other.key[start:]: other for other in siblings if other.key.rpartition("/")[0] == folder}
    return [versions[found] for found in companions(name, {key: each.size for key, each in versions.items()})]


def _is_weights(version: ObjectVersion) -> bool:
    return version.key.lower().endswith(SUFFIXES)


def _folder(version: ObjectVersion) -> str:
    return f"{version.origin}/{version.key.rpartition('/')[0]}"
