"""Blocks that access profiles left out of files: fetched when no reader asks for anything, so that the kernel can read
the files by itself.

Slowly, one file after the other, and only as far as nothing has to be evicted for it. A load that begins ends it for
its model.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable

from fusecache.errors import FusecacheError
from fusecache.fetch.prefetch_queues import QUIET_SECONDS
from fusecache.fetch.service import FetchService
from fusecache.prefetch.model_registry import ModelRegistry
from fusecache.prefetch.model_shards import ModelShards
from fusecache.types import ObjectVersion

_log = logging.getLogger(__name__)

_RESERVED_SHARE = 0.1
"""Share of the cache that is left alone by files for which no reader asked."""


class Backfill:
    """The scheduling lock of the service guards all state in here; methods without `_locked` take it.

    | File | Event | Next state |
    |---|---|---|
    | unknown | `add_files` | remaining |
    | remaining | all is quiet, and there is room for it | fetched slowly, without a mask |
    | remaining | all is quiet, and there is no room for it | unknown |
    | remaining, or fetched slowly | `stop_model_locked`: its model is being loaded | unknown, masked again |
    """

    def __init__(self, fetch_service: FetchService, registry: ModelRegistry) -> None:
        self._fetch_service = fetch_service
        self._lock = fetch_service.lock
        self._prefetches = fetch_service.scheduler.prefetches
        self._registry = registry
        self._remaining: deque[tuple[ObjectVersion, str]] = deque()
        self._is_scheduled = False

    def __len__(self) -> int:
        """Files that remain."""
        return len(self._remaining)

    def add_files(self, versions: Iterable[tuple[ObjectVersion, str]]) -> None:
        """Complete these, of these sources, when all is quiet."""
        with self._lock:
            self._remaining.extend(entry for entry in versions if entry not in self._remaining)
            self._schedule_locked()

    def _schedule_locked(self) -> None:
        if not self._is_scheduled and (self._remaining or self._prefetches.backfill_files):
            self._is_scheduled = True
            self._fetch_service.dispatcher.run_at_locked(
                time.monotonic() + QUIET_SECONDS / 2, self._continue_backfill
            )

    def stop_model_locked(self, model: ModelShards) -> None:
        """A load of this model begins: from now on its profile says what is fetched."""
        self._lock.assert_held()
        self._remaining = deque(entry for entry in self._remaining if entry[0] not in model.versions)
        for object_fetch in list(self._prefetches.backfill_files):
            file = self._registry.find_file(object_fetch.version.id)
            if file is not None and file.model is model:
                self._prefetches.drop_file(object_fetch)
                self._registry.mask_locked(object_fetch, file)

    def _continue_backfill(self) -> None:
        """Begin with the next file, if all is quiet. In a thread that fetches."""
        with self._lock:
            self._is_scheduled = False
            self._schedule_locked()
            is_quiet = time.monotonic() - self._prefetches.last_request_at >= QUIET_SECONDS
            if (
                not is_quiet
                or self._prefetches.backfill_files
                or self._prefetches.is_paused
                or not self._remaining
            ):
                # for those that are on their way, if it is quiet again
                self._fetch_service.dispatcher.wake_locked()
                return
            version, source = self._remaining.popleft()
        try:
            object_fetch = self._fetch_service.fetches.acquire(version, source)
        except FusecacheError as error:
            _log.debug("%s is not completed: %s", version.key, error)
            return
        stored = object_fetch.stored
        missing = stored.missing_block_count * stored.block_size
        if not stored.is_complete and missing <= stored.room_without_eviction(_RESERVED_SHARE):
            with self._lock:
                file = self._registry.find_file(version.id)
                is_being_loaded = file is not None and file.model.session is not None
                if object_fetch.gone_error is None and not is_being_loaded:
                    object_fetch.set_prefetch_mask(None)
                    self._prefetches.backfill_files.append(object_fetch)
                    self._fetch_service.dispatcher.wake_locked()
        self._fetch_service.release_fetch(object_fetch)
