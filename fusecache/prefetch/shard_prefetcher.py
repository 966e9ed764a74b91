"""The shards behind the one that is being read, in the order of the index."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from fusecache.bounded import BoundedDict
from fusecache.errors import FusecacheError
from fusecache.fetch.interface import CatalogView
from fusecache.fetch.scheduler import FetchScheduler
from fusecache.prefetch.browse_detector import BrowseDetector
from fusecache.prefetch.models import shard_order
from fusecache.prefetch.models.companions import shard_family
from fusecache.prefetch.office import Office
from fusecache.types import ObjectId, ObjectVersion

if TYPE_CHECKING:
    from fusecache.fetch.object_fetch import ObjectFetch

_log = logging.getLogger(__name__)

_PLAN_INTERVAL = 60.0
"""Seconds before another first read of a file looks again for the shards behind it."""
_MAX_PLANNED_FILES = 10_000


class ShardPrefetcher:
    """Queues whole files. `board` is guarded by the loader's lock; `budget` is in bytes behind the file being read."""

    def __init__(
        self, fetch_service: Office, scheduler: FetchScheduler, catalog: CatalogView, budget: int
    ) -> None:
        self._fetch_service = fetch_service
        self._scheduler = scheduler
        self._catalog = catalog
        self._budget = budget
        self._planned: BoundedDict[ObjectId, None] = BoundedDict(_MAX_PLANNED_FILES, max_age=_PLAN_INTERVAL)
        self._browse_detector = BrowseDetector()

    def plan_after(self, version: ObjectVersion, source: str) -> None:
        """A file is being read: fetch the shards behind it, too; those beside it, if it is a model's config."""
        shard = shard_order.is_shard(version.key)
        if not (shard or shard_order.is_config(version.key)):
            return
        now = time.monotonic()
        void: list[str] = []
        dropped: list[ObjectFetch] = []
        with self._fetch_service.lock:
            if shard:
                self._browse_detector.weights_read(_folder_of(version))
            elif void := self._browse_detector.announce_folder(_folder_of(version), now):
                dropped = self._scheduler.drop_unopened(lambda other: _folder_of(other) in void)
            planned = version.id in self._planned
            if not void and not planned:
                self._planned[version.id] = None
                self._scheduler.tasks.append(functools.partial(self._plan_shards, version, source))
                self._fetch_service.wake_workers_locked()
        for object_fetch in dropped:
            self._fetch_service.close_if_unused(object_fetch)

    def forget_plans(self, ids: Iterable[ObjectId]) -> None:
        """The load of these is over: look again when the next one begins."""
        with self._fetch_service.lock:
            for object_id in ids:
                self._planned.pop(object_id, None)

    def is_browsed(self, version: ObjectVersion) -> bool:
        """Whether so many configs are read that the models beside them are not loaded, but listed."""
        with self._fetch_service.lock:
            return bool(self._browse_detector.announce_folder(_folder_of(version), time.monotonic()))

    def _plan_shards(self, version: ObjectVersion, source: str) -> None:
        def read_index(index: ObjectVersion) -> bytes:
            object_fetch = self._fetch_service.acquire_fetch(index, source)
            try:
                return self._fetch_service.read_bytes(object_fetch, 0, index.size)
            finally:
                self._fetch_service.release_fetch(object_fetch)

        behind = shards_after(version, self._catalog.siblings(version), read_index, self._budget)
        with self._fetch_service.lock:
            if shard_order.is_config(version.key) and self._browse_detector.announce_folder(
                _folder_of(version), time.monotonic()
            ):
                return
        self.prefetch_files((other, source) for other in behind)

    def prefetch_files(self, versions: Iterable[tuple[ObjectVersion, str]]) -> None:
        """Fetch these versions (of these sources), in this order, without a reader."""
        with self._fetch_service.lock:
            known = {version.id for version, _ in self._scheduler.planned_files}
            known.update(object_fetch.version.id for object_fetch in self._scheduler.whole_files)
            fresh = [(version, source) for version, source in versions if version.id not in known]
            self._scheduler.planned_files.extend(fresh)
            self._fetch_service.wake_workers_locked()

    def start_file(self, version: ObjectVersion, source: str) -> None:
        """Its turn has come; in a thread of the crew."""
        try:
            object_fetch = self._fetch_service.acquire_fetch(version, source)
        except FusecacheError as error:
            _log.warning("%s is not fetched ahead: %s", version.key, error)
            return
        with self._fetch_service.lock:
            object_fetch.fetch_whole = True
            object_fetch.prefetch_mask = None
            if self._scheduler.add_whole_file(object_fetch):
                self._fetch_service.wake_workers_locked()
            complete = object_fetch.stored.is_servable
        self._fetch_service.inspect_if_unattested(object_fetch)
        if complete:
            self._catalog.version_completed(version)
        self._fetch_service.release_fetch(object_fetch)


def _folder_of(version: ObjectVersion) -> str:
    return f"{version.origin}/{version.key.rpartition('/')[0]}"


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
