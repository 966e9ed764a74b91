"""Listens to readers, and has fetched ahead what they will want next.

Theory of operation. A file that is read begins three things: the files that belong to it (companion_prefetcher.py) are
fetched; if it is a shard of a model, the model's access profile is followed (profile_follower.py); if there is none,
the shards behind it are fetched in the order of the index (shard_prefetcher.py). While a model is loaded, its reads are
recorded (session_tracker.py); the recording becomes its profile (profile_keeper.py).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.read_observer import ReadObserver
from fusecache.fetch.service import FetchService
from fusecache.prefetch.backfill import Backfill
from fusecache.prefetch.companion_prefetcher import CompanionPrefetcher
from fusecache.prefetch.interface import CatalogView, PeerProfiles, PrefetchSettings
from fusecache.prefetch.model_registry import ModelRegistry
from fusecache.prefetch.profile_follower import ProfileFollower
from fusecache.prefetch.profile_keeper import ProfileKeeper
from fusecache.prefetch.profiles.profile_store import ProfileStore
from fusecache.prefetch.session_tracker import SessionTracker
from fusecache.prefetch.shard_prefetcher import ShardPrefetcher
from fusecache.types import ObjectVersion


class Prefetcher(ReadObserver):
    """Observes the readers of one `fetch_service`, whose observers it joins. Without a `profile_store`, or with
    settings.learn off, nothing is recorded or followed, and only headers are fetched first. The scheduling lock of the
    service guards all state of its parts."""

    def __init__(
        self,
        fetch_service: FetchService,
        catalog: CatalogView,
        settings: PrefetchSettings,
        profile_store: ProfileStore | None = None,
        peer_profiles: PeerProfiles | None = None,
    ) -> None:
        self._fetch_service = fetch_service
        self._is_enabled = settings.is_enabled
        keeper = ProfileKeeper(fetch_service.lock, profile_store if settings.learn else None, peer_profiles)
        self.stats = keeper.stats
        self._shard_prefetcher = ShardPrefetcher(fetch_service, catalog, settings.budget)
        self._companion_prefetcher = CompanionPrefetcher(catalog, fetch_service.start_file)
        self._registry = ModelRegistry(fetch_service, catalog, keeper, settings.read_ahead)
        self.backfill = Backfill(fetch_service, self._registry)
        self._tracker = SessionTracker(
            fetch_service,
            registry=self._registry,
            keeper=keeper,
            backfill=self.backfill,
            shard_prefetcher=self._shard_prefetcher,
        )
        self._follower = ProfileFollower(
            fetch_service,
            registry=self._registry,
            tracker=self._tracker,
            keeper=keeper,
            shard_prefetcher=self._shard_prefetcher,
            budget=settings.budget,
        )
        fetch_service.observers.subscribe(self)

    def fetch_opened(self, object_fetch: ObjectFetch) -> None:
        """Finds out which model the file is a part of, and what its profile says. Does disk I/O."""
        if self._is_enabled:
            self._registry.attach_model(object_fetch)

    def blocks_missed_locked(self, object_fetch: ObjectFetch, missing: Sequence[int]) -> None:
        """Counts the blocks that the profile does not name: too many of them, and it is not followed any more."""
        self._follower.blocks_missed_locked(object_fetch, missing)

    def hold_back_locked(self, object_fetch: ObjectFetch) -> float:
        """A moment, as long as it is not known whether there is a profile."""
        return self._follower.hold_back_locked(object_fetch)

    def observes_reads(self, object_fetch: ObjectFetch) -> bool:
        """Whether the file is a part of a model."""
        return self._registry.find_file(object_fetch.version.id) is not None

    def needs_exact_reads(self, object_fetch: ObjectFetch) -> bool:
        """Whether the file is read by a profile, or its reads are recorded to make one."""
        file = self._registry.find_file(object_fetch.version.id)
        return object_fetch.prefetch_mask is not None or (file is not None and file.model.is_learning)

    def read(self, object_fetch: ObjectFetch, offset: int, length: int, process_id: int) -> None:
        """Records the read, if its model is being loaded."""
        self._registry.record_read(object_fetch, offset, length, process_id)

    def file_opened(self, version: ObjectVersion, *, is_passthrough: bool) -> bool:
        """Begins the load of a model, or joins it."""
        return self._tracker.file_opened(version, is_passthrough=is_passthrough)

    def file_closed(self, version: ObjectVersion) -> None:
        """The load of the model may be over soon."""
        self._tracker.file_closed(version)

    def whole_file_wanted(self, version: ObjectVersion, source: str) -> None:
        """Has fetched what comes along with the file, and what its reader will want next if it is a shard or the config
        of a model."""
        if not self._is_enabled:
            return
        if self._companion_prefetcher.mark_if_due(version):
            self._fetch_service.dispatcher.run_soon(
                functools.partial(self._companion_prefetcher.prefetch_companions, version, source)
            )
        if not self._follower.begin_load(version, source):
            self._shard_prefetcher.plan_after(version, source)

    def close(self) -> None:
        """Keeps the profiles of loads that are over."""
        self._tracker.close()
