"""An object store in memory for tests of the catalog: versions only, no bytes."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

from fusecache.catalog.entry import CatalogSource
from fusecache.errors import FusecacheError, NotFoundError
from fusecache.types import ObjectVersion


class Objects:
    """`put`, `delete`, then `source()`. `error`, when set, is what LIST and stat raise; LIST waits for `gate`."""

    def __init__(self, identity: str = "memory://bucket") -> None:
        self.identity = identity
        self.versions: dict[str, ObjectVersion] = {}
        self.error: FusecacheError | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.listing = threading.Event()
        """Set once a LIST has begun."""
        self.lists = 0
        self.stats = 0
        self._tick = itertools.count(1)

    def put(self, key: str, size: int = 10) -> ObjectVersion:
        """Write an object; every write is a new version."""
        tick = next(self._tick)
        version = ObjectVersion(self.identity, key, f'"{tick}"', size, tick * 1_000_000_000)
        self.versions[key] = version
        return version

    def delete(self, key: str) -> None:
        """Take an object away."""
        del self.versions[key]

    def list_objects(self) -> Iterator[ObjectVersion]:
        """All versions, in the order of keys."""
        self.lists += 1
        self.listing.set()
        found = [self.versions[key] for key in sorted(self.versions)]
        self.gate.wait(60)
        if self.error is not None:
            raise self.error
        yield from found

    def stat_object(self, key: str) -> ObjectVersion:
        """One version. Raises NotFoundError."""
        self.stats += 1
        if self.error is not None:
            raise self.error
        try:
            return self.versions[key]
        except KeyError:
            raise NotFoundError(f"{key} does not exist") from None

    def source(self, name: str = "") -> CatalogSource:
        """For Catalog."""
        return CatalogSource(name, self.identity, self.list_objects, self.stat_object)


class Hand:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
