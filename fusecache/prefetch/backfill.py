"""What recordings left out of files: fetched when nobody asks for anything, so that the kernel can read them by itself.

Slowly, one file after the other, and only as far as nothing has to be evicted for it. A load that begins ends it for
its model.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable

from fusecache.errors import FusecacheError
from fusecache.fetch.scheduler import QUIET_SECONDS, FetchScheduler
from fusecache.prefetch.models.shards import ModelShards
from fusecache.prefetch.office import Office
from fusecache.types import ObjectVersion

_log = logging.getLogger(__name__)

_RESERVED_SHARE = 0.1
"""Share of the cache that is left alone by what nobody asked for."""


class Backfill:
    """Guarded by the loader's lock, as `board` is."""

    def __init__(self, fetch_service: Office, scheduler: FetchScheduler) -> None:
        self._fetch_service = fetch_service
        self._scheduler = scheduler
        self._remaining: deque[tuple[ObjectVersion, str]] = deque()
        self._is_scheduled = False

    def __len__(self) -> int:
        """Files that are left."""
        return len(self._remaining)

    def add_files(self, versions: Iterable[tuple[ObjectVersion, str]]) -> None:
        """Complete these, of these sources, when there is time."""
        with self._fetch_service.lock:
            self._remaining.extend(entry for entry in versions if entry not in self._remaining)
            self._schedule_locked()

    def _schedule_locked(self) -> None:
        if not self._is_scheduled and (self._remaining or self._scheduler.backfill_files):
            self._is_scheduled = True
            self._scheduler.schedule_task(time.monotonic() + QUIET_SECONDS / 2, self._continue_backfill)
            self._fetch_service.wake_workers_locked()

    def stop_model_locked(self, model: ModelShards) -> None:
        """A load of this model begins: from now on its own order counts. With the lock."""
        self._remaining = deque(entry for entry in self._remaining if entry[0] not in model.versions)
        for object_fetch in list(self._scheduler.backfill_files):
            if object_fetch.model is model:
                self._scheduler.drop_file(object_fetch)
                object_fetch.prefetch_mask = (
                    None
                    if object_fetch.stored.is_unattested
                    else model.prefetch_mask_of(object_fetch.file_number)
                )

    def _continue_backfill(self) -> None:
        with self._fetch_service.lock:
            self._is_scheduled = False
            self._schedule_locked()
            quiet = time.monotonic() - self._scheduler.last_request_at >= QUIET_SECONDS
            if (
                not quiet
                or self._scheduler.backfill_files
                or self._scheduler.is_prefetch_paused
                or not self._remaining
            ):
                self._fetch_service.wake_workers_locked()  # for those that are on their way, if it is quiet again
                return
            version, source = self._remaining.popleft()
        try:
            object_fetch = self._fetch_service.acquire_fetch(version, source)
        except FusecacheError as error:
            _log.debug("%s is not completed: %s", version.key, error)
            return
        missing = object_fetch.stored.missing_block_count * object_fetch.stored.block_size
        if not object_fetch.stored.is_complete and missing <= object_fetch.stored.room_without_eviction(
            _RESERVED_SHARE
        ):
            with self._fetch_service.lock:
                if object_fetch.gone_error is None and (
                    object_fetch.model is None or object_fetch.model.session is None
                ):
                    object_fetch.prefetch_mask = None
                    self._scheduler.backfill_files.append(object_fetch)
                    self._fetch_service.wake_workers_locked()
        self._fetch_service.release_fetch(object_fetch)
