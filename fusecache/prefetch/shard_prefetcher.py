"""The shards behind the one that is being read, in the order of the index."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Sequence

from fusecache.bounded import BoundedDict
from fusecache.errors import FusecacheError
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.service import FetchService
from fusecache.prefetch.browse_detector import BrowseDetector
from fusecache.prefetch.interface import CatalogView
from fusecache.prefetch.models import shard_order
from fusecache.prefetch.models.companions import shard_family
from fusecache.prefetch.models.shard_order import folder_of
from fusecache.types import ObjectId, ObjectVersion

_log = logging.getLogger(__name__)

_PLAN_INTERVAL = 60.0
"""Seconds before another first read of a file looks again for the shards behind it."""
_MAX_PLANNED_FILES = 10_000


class ShardPrefetcher:
    """Plans whole files; `budget` is in bytes behind the file being read. The scheduling lock of the service guards all
    state in here; all methods take it."""

    def __init__(self, fetch_service: FetchService, catalog: CatalogView, budget: int) -> None:
        self._fetch_service = fetch_service
        self._lock = fetch_service.lock
        self._catalog = catalog
        self._budget = budget
        self._planned: BoundedDict[ObjectId, None] = BoundedDict(_MAX_PLANNED_FILES, max_age=_PLAN_INTERVAL)
        self._browse_detector = BrowseDetector()

    def plan_after(self, version: ObjectVersion, source: str) -> None:
        """A file is being read: have the shards behind it fetched, too; those beside it, if it is a model's config.
        Does not block."""
        is_shard = shard_order.is_shard(version.key)
        if not (is_shard or shard_order.is_config(version.key)):
            return
        now = time.monotonic()
        browsed: list[str] = []
        dropped: list[ObjectFetch] = []
        with self._lock:
            if is_shard:
                self._browse_detector.weights_read(folder_of(version))
            elif browsed := self._browse_detector.announce_folder(folder_of(version), now):
                dropped = self._fetch_service.scheduler.prefetches.drop_unopened(
                    lambda other: folder_of(other) in browsed
                )
            if not browsed and version.id not in self._planned:
                self._planned[version.id] = None
                self._fetch_service.dispatcher.run_soon_locked(
                    functools.partial(self._plan_shards, version, source)
                )
        for object_fetch in dropped:
            self._fetch_service.fetches.close_if_unused(object_fetch)

    def forget_plans(self, ids: Iterable[ObjectId]) -> None:
        """The load of these is over: look again when the next one begins."""
        with self._lock:
            for object_id in ids:
                self._planned.pop(object_id, None)

    def announce_config(self, version: ObjectVersion) -> bool:
        """A config was read; returns whether so many are that the models beside them are listed, and not loaded."""
        with self._lock:
            return bool(self._browse_detector.announce_folder(folder_of(version), time.monotonic()))

    def _plan_shards(self, version: ObjectVersion, source: str) -> None:
        """Find out what is behind a file, and have it fetched. In a thread that fetches; may read the index."""

        def read_index(index: ObjectVersion) -> bytes:
            object_fetch = self._fetch_service.fetches.acquire(index, source)
            try:
                return self._fetch_service.read_bytes(object_fetch, 0, index.size)
            finally:
                self._fetch_service.release_fetch(object_fetch)

        behind = shards_after(version, self._catalog.siblings(version), read_index, self._budget)
        with self._lock:
            if shard_order.is_config(version.key) and self._browse_detector.is_browsed(time.monotonic()):
                return
        self._fetch_service.dispatcher.plan_files((other, source) for other in behind)


def shards_after(
    version: ObjectVersion,
    siblings: Sequence[ObjectVersion],
    read_index: Callable[[ObjectVersion], bytes],
    budget: int,
) -> list[ObjectVersion]:
    """The versions to fetch after this one, in order, as far as `budget` bytes go.

    `siblings` may hold more than its folder. An index that `read_index` can't read is done without.
    """
    if not shard_order.is_config(version.key) and not _may_be_shard(version, siblings):
        return []
    versions = shard_order.files_in_folder(version, siblings)
    name = version.key.rpartition("/")[2]
    order: list[str] = []
    index = shard_order.find_index(name, list(versions))
    if index is not None and versions[index].size <= shard_order.MAX_INDEX_BYTES:
        try:
            order = shard_order.shards_in_index(read_index(versions[index]))
        except FusecacheError as error:
            _log.warning("%s can't be read, shards are fetched by name: %s", index, error)
    behind = []
    for other in shard_order.shards_following(name, list(versions), order):
        budget -= versions[other].size
        if budget < 0:
            break
        behind.append(versions[other])
    return behind


def _may_be_shard(version: ObjectVersion, siblings: Sequence[ObjectVersion]) -> bool:
    """Whether its name, or maybe an index, says that it is a shard; quick, since it may be one of thousands that have
    nothing to do with each other."""
    name = version.key.rpartition("/")[2]
    return shard_family(name) is not None or any(
        other.key.endswith(shard_order.INDEX_SUFFIX) for other in siblings
    )
