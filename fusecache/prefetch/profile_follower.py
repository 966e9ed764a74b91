"""Has fetched ahead what a load of a model will read: the headers of all its files, and what its access profile names.

A profile that leaves blocks out makes files *sparse* (`ObjectFetch.prefetch_mask`): only blocks that it names are
fetched ahead. Readers that stray from it end that, and all goes on as if there were no profile. The rest of sparse
files is fetched when all is quiet (backfill.py).

| Study of a session | Event | Next state |
|---|---|---|
| not planned | a file of the model is read | planned: a task has the headers fetched |
| planned | there is a profile, or no other node to ask | followed; studied |
| planned | there is none: other nodes are asked | studied when they have answered |
| any | readers stray from the profile | wrong, for this session: no file is sparse any more |

Interleavings worth knowing. (1) A file is opened while other nodes are asked: it hears of the answer (`_study_ended`),
and until then, for a moment, nothing is fetched ahead of it (`hold_back_locked`). (2) A session ends while its task
still puts the runs together: the task sees that under the lock, and releases what it opened. (3) Readers stray before
the study is over: what the study finds then makes no file sparse again, also if their session has ended meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Sequence

from fusecache.errors import FusecacheError
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.ordered_runs import OrderedRuns
from fusecache.fetch.service import FetchService
from fusecache.prefetch.model_registry import ModelRegistry
from fusecache.prefetch.model_shards import LoadSession, ModelShards
from fusecache.prefetch.models.headers import fetch_headers
from fusecache.prefetch.models.shard_order import is_announcement, is_config
from fusecache.prefetch.profile_keeper import ProfileKeeper
from fusecache.prefetch.session_tracker import SessionTracker
from fusecache.prefetch.shard_prefetcher import ShardPrefetcher
from fusecache.types import ObjectVersion

_log = logging.getLogger(__name__)

_MAX_HOLD_BACK_SECONDS = 0.3
"""Most seconds that a file is not fetched ahead because headers are queued, or other nodes asked for a profile."""
_HEADERS_INTERVAL = 60.0
_BLOCKS_PER_STRAY = 8
"""One block for so many that the profile names, read though it is not named, and the profile is wrong."""
_MIN_STRAYS = 4


class ProfileFollower:
    """The scheduling lock of the service guards all state in here; methods without `_locked` take it. `budget` is in
    bytes per load."""

    def __init__(
        self,
        fetch_service: FetchService,
        *,
        registry: ModelRegistry,
        tracker: SessionTracker,
        keeper: ProfileKeeper,
        shard_prefetcher: ShardPrefetcher,
        budget: int,
    ) -> None:
        self._fetch_service = fetch_service
        self._lock = fetch_service.lock
        self._registry = registry
        self._tracker = tracker
        self._keeper = keeper
        self._shard_prefetcher = shard_prefetcher
        self._budget = budget

    # -- what readers do

    def begin_load(self, version: ObjectVersion, source: str) -> bool:
        """A file is being read; returns whether nothing else has to say what is fetched then: the profile of its model
        does, or all of the model is here. May do disk I/O."""
        if is_announcement(version.key.rpartition("/")[2]):
            self._fetch_service.dispatcher.run_soon(
                functools.partial(self._prefetch_announced, version, source)
            )
            return is_config(version.key)
        file = self._registry.find_file(version.id)
        if file is None:
            return False
        model = file.model
        if self._registry.is_stored_whole(model):
            return True
        with self._lock:
            session = self._tracker.current_session_locked(model)
            if not session.is_planned:
                session.is_planned = True
                self._fetch_service.dispatcher.run_soon_locked(
                    functools.partial(self._study_model, model, session)
                )
            if self._keeper.asks_peers and model.is_learning and not session.is_studied:
                session.plan_after = version, source  # until they have answered
                return True
            return model.profile is not None and not session.is_profile_wrong

    def hold_back_locked(self, object_fetch: ObjectFetch) -> float:
        """For how many seconds nothing is fetched ahead of this file: until the study of its model is over, but only a
        moment."""
        self._lock.assert_held()
        file = self._registry.find_file(object_fetch.version.id)
        if file is None or self._tracker.current_session_locked(file.model).is_studied:
            return 0.0
        return _MAX_HOLD_BACK_SECONDS

    def blocks_missed_locked(self, object_fetch: ObjectFetch, missing: Sequence[int]) -> None:
        """A reader asks for blocks, and these of them are not there: too many that the profile does not name, and it is
        not followed any more."""
        self._lock.assert_held()
        file = self._registry.find_file(object_fetch.version.id)
        if object_fetch.prefetch_mask is None or file is None:
            return
        strays = file.model.stray_counts
        strays[file.number] += sum(object_fetch.is_stray(block) for block in missing)
        if strays[file.number] > max(_MIN_STRAYS, object_fetch.prefetch_mask.count(1) // _BLOCKS_PER_STRAY):
            self._abandon_profile_locked(file.model, object_fetch)

    def _abandon_profile_locked(self, model: ModelShards, stray: ObjectFetch) -> None:
        """The profile does not fit the load: go on as if there were none."""
        self._keeper.stats.wrong += 1
        _log.info("%s: read otherwise than recorded: all of its model is fetched", stray.version.key)
        session = self._tracker.current_session_locked(model)
        session.is_profile_wrong = True
        prefetches = self._fetch_service.scheduler.prefetches
        if session.ordered_runs is not None:
            with contextlib.suppress(ValueError):
                prefetches.ordered_runs.remove(session.ordered_runs)
        for version in model.versions:
            object_fetch = self._fetch_service.fetches.find_locked(version.id)
            if object_fetch is not None and object_fetch.prefetch_mask is not None:
                object_fetch.set_prefetch_mask(None)
                if object_fetch.fetch_whole:
                    prefetches.add_whole_file(object_fetch)
        self._fetch_service.dispatcher.run_soon_locked(
            functools.partial(self._shard_prefetcher.plan_after, stray.version, stray.source)
        )
        self._fetch_service.dispatcher.wake_locked()

    # -- tasks, in threads that fetch

    def _prefetch_announced(self, version: ObjectVersion, source: str) -> None:
        """An index or a config was read: have the headers of its shards fetched, and after a config, what the profile
        names, or all of them."""
        is_of_config = is_config(version.key)
        shards = self._registry.shards_with(version)
        if shards and all(self._fetch_service.store.has_whole(shard) for shard in shards):
            return
        if not shards or (is_of_config and self._shard_prefetcher.announce_config(version)):
            if is_of_config:
                self._shard_prefetcher.plan_after(version, source)
            return
        try:
            object_fetch = self._fetch_service.fetches.acquire(shards[0], source)
        except FusecacheError as error:
            _log.debug("no headers of %s: %s", shards[0].key, error)
            return
        file = self._registry.find_file(shards[0].id)
        if file is not None:
            self._fetch_headers_if_due(file.model)
        if is_of_config and not self.begin_load(shards[0], source):
            self._shard_prefetcher.plan_after(version, source)
        self._fetch_service.release_fetch(object_fetch)

    def _study_model(self, model: ModelShards, session: LoadSession) -> None:
        """At the beginning of a load: headers, what other nodes know, the profile."""
        if self._keeper.asks_peers and model.is_learning and not session.has_asked_peers:
            session.has_asked_peers = True
            self._fetch_service.dispatcher.run_soon(functools.partial(self._ask_peers, model, session))
            self._fetch_headers_if_due(model)
            return
        self._fetch_headers_if_due(model)
        if model.profile is not None:
            self._follow_profile(model, session)
        self._study_ended(model, session)

    def _fetch_headers_if_due(self, model: ModelShards) -> None:
        now = time.monotonic()
        with self._lock:
            if now - model.headers_fetched_at < _HEADERS_INTERVAL:
                return
            model.headers_fetched_at = now
        fetch_headers(self._fetch_service, model.versions, model.source, model.layouts)

    def _ask_peers(self, model: ModelShards, session: LoadSession) -> None:
        if self._keeper.fetch_from_peers(model):
            self._follow_profile(model, session)
        self._study_ended(model, session)

    def _study_ended(self, model: ModelShards, session: LoadSession) -> None:
        """It is known what there is to know: go on with the files that were opened meanwhile."""
        with self._lock:
            session.is_studied = True
            behind, session.plan_after = session.plan_after, None
            # a later decision stands: readers strayed, or the load is over
            is_followed = session is model.session and not session.is_profile_wrong
            for version in model.versions:
                object_fetch = self._fetch_service.fetches.find_locked(version.id)
                file = self._registry.find_file(version.id)
                if object_fetch is None:
                    continue
                if not object_fetch.backoff.failure_count:
                    object_fetch.backoff.end()
                if (
                    is_followed
                    and file is not None
                    and object_fetch.prefetch_mask is None
                    and self._registry.mask_locked(object_fetch, file)
                ):
                    self._fetch_service.scheduler.prefetches.drop_file(object_fetch)
            self._fetch_service.dispatcher.wake_locked()
        if behind is not None and model.profile is None:
            self._shard_prefetcher.plan_after(*behind)

    def _follow_profile(self, model: ModelShards, session: LoadSession) -> None:
        """Have fetched what the profile names, as far as the budget reaches."""
        profile = model.profile
        assert profile is not None
        fetches: dict[int, ObjectFetch] = {}
        for number in profile.file_order():
            try:
                fetches[number] = self._fetch_service.fetches.acquire(model.versions[number], model.source)
            except FusecacheError as error:
                _log.warning("%s is not fetched ahead: %s", model.versions[number].key, error)
        steps, budget = [], self._budget
        for run in profile.runs:
            budget -= (run.stop - run.start) * model.block_size
            if budget < 0:
                break
            if run.file in fetches:
                steps.append((fetches[run.file], range(run.start, run.stop)))
        # nodes that start together would ask one owner for the same stripe: there, all of it comes in each node's order
        is_shared = model.needed_blocks is None and any(
            object_fetch.route is not None for object_fetch in fetches.values()
        )
        runs = OrderedRuns([] if is_shared else steps)
        prefetches = self._fetch_service.scheduler.prefetches
        with self._lock:
            is_cold = any(
                object_fetch.idle.find(1, blocks.start, blocks.stop) >= 0 for object_fetch, blocks in steps
            )
            if is_cold:
                self._keeper.stats.replayed += 1
            is_followed = (
                session is model.session and not session.is_profile_wrong and not prefetches.is_paused
            )
            if is_followed:
                session.ordered_runs = runs
                prefetches.ordered_runs.append(runs)
                self._fetch_service.dispatcher.wake_locked()
        if is_cold:
            _log.info(
                "%s: following the recording of an earlier load: %d of %d blocks in %d files",
                model.versions[0].key,
                profile.block_count,
                sum(model.block_counts),
                len(fetches),
            )
        if is_shared and is_followed:
            self._fetch_service.dispatcher.plan_files(
                (object_fetch.version, object_fetch.source)
                for object_fetch in dict.fromkeys(object_fetch for object_fetch, _ in steps)
            )
        for object_fetch in fetches.values():
            if not is_followed or object_fetch not in runs.fetches:
                self._fetch_service.release_fetch(object_fetch)
