"""The order in which a model is read: taken down at its first load, followed at the next ones.

Theory of operation. The first open or read of a shard begins a *session* of its model. A task of the crew has the
headers fetched, asks other nodes for a recording if the cache directory has none, and follows what it found. While a
session lasts the READs of its files are taken down (recorder.py); when nobody reads any more, that becomes the
recording, if there was none, or if the one that was followed was wrong. A load of a model that is whole in the store
has no session: there is nothing to fetch and nothing to hear (`_is_here`).

A recording that leaves blocks out makes files *sparse* (`ObjectFetch.prefetch_mask`): only what it names is
fetched ahead, and
what somebody asks for. Readers who stray from it end that, and all goes on as if there were none (`asked`). The rest
of sparse files is fetched when all is quiet (filling.py).

Ownership: the loader's lock guards everything in here. Interleavings worth knowing. (1) A load is opened while the
answer of other nodes is awaited: it is told when that is there (`_studied`), and until then, for a moment, it is
not fetched ahead (`first_read`). (2) A session ends while its task still puts the steps together: the task sees
that under the lock, and lets go of what it opened.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from fusecache.bounded import BoundedDict
from fusecache.errors import FusecacheError
from fusecache.fetch.interface import CatalogView, FetchSettings, PeerProfiles, Shelf
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.ordered_runs import OrderedRuns
from fusecache.fetch.scheduler import FetchScheduler
from fusecache.prefetch.backfill import Backfill
from fusecache.prefetch.models.headers import fetch_headers
from fusecache.prefetch.models.shard_order import (
    files_in_folder,
    is_announcement,
    is_config,
    is_shard,
    shards_of_model,
)
from fusecache.prefetch.models.shards import LoadSession, ModelShards, is_worth_learning
from fusecache.prefetch.office import Office
from fusecache.prefetch.profiles.access_profile import ProfileError, pack_profile, unpack_profile
from fusecache.prefetch.profiles.recorder import ProfileRecorder
from fusecache.prefetch.shard_prefetcher import ShardPrefetcher
from fusecache.types import ObjectId, ObjectVersion

_log = logging.getLogger(__name__)

_SESSION_CHECK_SECONDS = 1.0
"""Seconds between looks at whether a load is over."""
_MAX_HOLD_BACK_SECONDS = 0.3
"""Most seconds that a file is not fetched ahead because headers are queued, or other nodes asked for a recording."""
_HEADERS_INTERVAL = 60.0
_MAX_FILES = 20_000
_BLOCKS_PER_STRAY = 8
"""One block for so many that are wanted, read though it is not, and the recording is wrong."""
_MIN_STRAYS = 4


@dataclass
class ProfileStats:
    """Counters since the start: recordings made, loads that followed one, loads that strayed from it, recordings that
    came from other nodes."""

    recorded: int = 0
    replayed: int = 0
    wrong: int = 0
    from_nodes: int = 0


class SessionTracker:
    """One per loader. Without `shelf`, or with learn off, nothing is taken down or followed, and only headers are seen
    to. Thread-safe; methods that are called with the loader's lock say so."""

    def __init__(
        self,
        fetch_service: Office,
        scheduler: FetchScheduler,
        catalog: CatalogView,
        settings: FetchSettings,
        shard_prefetcher: ShardPrefetcher,
        profile_store: Shelf | None,
        peer_profiles: PeerProfiles | None,
    ) -> None:
        self.stats = ProfileStats()
        self._fetch_service = fetch_service
        self._scheduler = scheduler
        self._catalog = catalog
        self._settings = settings
        self._shard_prefetcher = shard_prefetcher
        self._profile_store = profile_store if settings.learn else None
        self._peer_profiles = peer_profiles
        self.backfill = Backfill(fetch_service, scheduler)
        self._models: BoundedDict[ObjectId, ModelShards | None] = BoundedDict(_MAX_FILES)
        """By each of its files; None: nothing is learned of that one."""

    # -- which model a file is a part of

    def attach_model(self, object_fetch: ObjectFetch) -> None:
        """Tell a new load of a shard what it is a part of, and what is known of that. Does disk I/O."""
        if not self._settings.prefetch or not is_shard(object_fetch.version.key):
            return
        with self._fetch_service.lock:
            known = object_fetch.version.id in self._models
        if not known:
            self._discover_model(object_fetch.version, object_fetch.source, object_fetch.stored.block_size)
        with self._fetch_service.lock:
            self._assign_model_locked(object_fetch, self._models.get(object_fetch.version.id))

    def _assign_model_locked(self, object_fetch: ObjectFetch, model: ModelShards | None) -> None:
        object_fetch.model = model
        if model is not None:
            object_fetch.file_number = model.number_of(object_fetch.version.id)
            # all of a sealed file has to be there before anybody reads any of it
            object_fetch.prefetch_mask = (
                None
                if object_fetch.stored.is_unattested
                else model.prefetch_mask_of(object_fetch.file_number)
            )
            object_fetch.stray_count = 0

    def _discover_model(self, version: ObjectVersion, source: str, block_size: int) -> None:
        versions = self._model_shards(version)
        model = None
        if version in versions and is_worth_learning(versions, block_size):
            learns = self._profile_store is not None
            model = ModelShards(source, versions, block_size, self._settings.read_ahead, learns)
            data = self._profile_store.load_profile(model.id) if self._profile_store is not None else None
            if data is not None:
                self._adopt_packed_profile(model, data, "in the cache directory")
        with self._fetch_service.lock:
            if model is None:
                self._models[version.id] = None
                return
            for other in model.versions:
                self._models[other.id] = model
                object_fetch = self._fetch_service.find_fetch_locked(other.id)
                if object_fetch is not None:
                    self._assign_model_locked(object_fetch, model)

    def _model_shards(self, version: ObjectVersion) -> tuple[ObjectVersion, ...]:
        """Those that this file belongs to, or announces, in the order of their keys."""
        names = files_in_folder(version, self._catalog.siblings(version))
        return tuple(names[name] for name in shards_of_model(version.key.rpartition("/")[2], list(names)))

    def _adopt_packed_profile(self, model: ModelShards, data: bytes, source_text: str) -> bool:
        """Whether these bytes are a recording of this model, which is followed from now on."""
        key = model.versions[0].key
        try:
            profile = unpack_profile(data)
        except ProfileError as error:
            _log.warning("the recording of %s %s is passed over: %s", key, source_text, error)
            return False
        with self._fetch_service.lock:
            fits = model.adopt_profile(profile)
        if not fits:
            _log.warning("the recording of %s %s is passed over: it is one of other files", key, source_text)
        return fits

    # -- what is opened, read and closed

    def hold_back_locked(self, object_fetch: ObjectFetch) -> None:
        """Somebody is going to read this file: it is not fetched ahead until its session's task has told what it found,
        or a moment has passed. With the lock."""
        if object_fetch.model is not None and not self._current_session_locked(object_fetch.model).is_studied:
            object_fetch.backoff_until = time.monotonic() + _MAX_HOLD_BACK_SECONDS
            self._scheduler.schedule_recheck(object_fetch.backoff_until, object_fetch, range(0))

    def begin_session(self, version: ObjectVersion, source: str) -> bool:
        """A file is being read; returns whether nothing else has to say what is fetched then: a recording does, or all
        is here. May look at the disk."""
        if is_announcement(version.key.rpartition("/")[2]):
            self._fetch_service.queue_task(functools.partial(self._prefetch_announced, version, source))
            return is_config(version.key)
        with self._fetch_service.lock:
            model = self._models.get(version.id)
        if model is None:
            return False
        if self._is_stored_whole(model):
            return True
        with self._fetch_service.lock:
            session = self._current_session_locked(model)
            if not session.is_planned:
                session.is_planned = True
                self._scheduler.tasks.append(functools.partial(self._study_model, model, session))
                self._fetch_service.wake_workers_locked()
            if self._peer_profiles is not None and model.is_learning and not session.is_studied:
                session.plan_after = version, source  # until they have answered
                return True
            return model.profile is not None and not session.is_profile_wrong

    def _prefetch_announced(self, version: ObjectVersion, source: str) -> None:
        """An index or a config was read: have the headers of its shards fetched, and after a config, what a recording
        says, or all of them. In a thread of the crew."""
        config = is_config(version.key)
        shards = self._model_shards(version)
        if shards and all(self._fetch_service.store.has_whole(shard) for shard in shards):
            return
        if not shards or (config and self._shard_prefetcher.is_browsed(version)):
            if config:
                self._shard_prefetcher.plan_after(version, source)
            return
        try:
            object_fetch = self._fetch_service.acquire_fetch(shards[0], source)
        except FusecacheError as error:
            _log.debug("no headers of %s: %s", shards[0].key, error)
            return
        if object_fetch.model is not None:
            self._fetch_headers_if_due(object_fetch.model)
        if config and not self.begin_session(shards[0], source):
            self._shard_prefetcher.plan_after(version, source)
        self._fetch_service.release_fetch(object_fetch)

    def _is_stored_whole(self, model: ModelShards) -> bool:
        """Whether all files of a model are whole in the store, and no load of it is going on. Without the lock."""
        now = time.monotonic()
        with self._fetch_service.lock:
            if model.session is not None:
                return False
            if now - model.found_whole_at < _SESSION_CHECK_SECONDS:
                return True
        if not all(self._fetch_service.store.has_whole(version) for version in model.versions):
            return False
        with self._fetch_service.lock:
            model.found_whole_at = now
            return model.session is None

    def file_opened(self, version: ObjectVersion, *, is_passthrough: bool) -> bool:
        """Somebody opened a file; `whole`: the kernel answers its reads. If it returns True, pair it with `left`. May
        look at the disk."""
        with self._fetch_service.lock:
            model = self._models.get(version.id)
        if model is None or (is_passthrough and self._is_stored_whole(model)):
            return False
        with self._fetch_service.lock:
            session = self._current_session_locked(model)
            session.open_files += 1
            session.has_opened_file = True
            session.is_cold = session.is_cold or not is_passthrough
            recorder = session.recorder
        if recorder is not None:
            recorder.file_opened(model.number_of(version.id), is_passthrough=is_passthrough)
        return True

    def file_closed(self, version: ObjectVersion) -> None:
        """The last who had a file open closed it. Takes microseconds."""
        with self._fetch_service.lock:
            model = self._models.get(version.id)
            if model is not None and model.session is not None:
                model.session.open_files = max(0, model.session.open_files - 1)
                model.session.last_activity_at = time.monotonic()

    def blocks_requested_locked(self, object_fetch: ObjectFetch, missing: Sequence[int]) -> None:
        """A reader asks for blocks, and these of them are not there. With the lock."""
        self._scheduler.last_request_at = time.monotonic()
        if object_fetch.prefetch_mask is None or not missing or object_fetch.model is None:
            return
        object_fetch.stray_count += sum(object_fetch.is_stray(block) for block in missing)
        if object_fetch.stray_count > max(
            _MIN_STRAYS, object_fetch.prefetch_mask.count(1) // _BLOCKS_PER_STRAY
        ):
            self._abandon_profile_locked(object_fetch.model, object_fetch)

    def _abandon_profile_locked(self, model: ModelShards, stray: ObjectFetch) -> None:
        """The recording does not fit the load: go on as if there were none."""
        self.stats.wrong += 1
        _log.info("%s: read otherwise than recorded: all of its model is fetched", stray.version.key)
        session = self._current_session_locked(model)
        session.is_profile_wrong = True
        if session.ordered_runs is not None:
            with contextlib.suppress(ValueError):
                self._scheduler.ordered_runs.remove(session.ordered_runs)
        for version in model.versions:
            object_fetch = self._fetch_service.find_fetch_locked(version.id)
            if object_fetch is not None and object_fetch.prefetch_mask is not None:
                object_fetch.prefetch_mask = None
                if object_fetch.fetch_whole:
                    self._scheduler.add_whole_file(object_fetch)
        self._scheduler.tasks.append(
            functools.partial(self._shard_prefetcher.plan_after, stray.version, stray.source)
        )
        self._fetch_service.wake_workers_locked()

    # -- a session, in tasks of the crew

    def _current_session_locked(self, model: ModelShards) -> LoadSession:
        """The one that is going on, or a new one. With the lock."""
        now = time.monotonic()
        session = model.session
        if session is None:
            recorder = None
            if model.learns_order:
                recorder = ProfileRecorder(
                    model.id, model.block_size, model.block_counts, model.readahead_bytes
                )
            session = model.session = LoadSession(recorder, now)
            model.recorder = recorder
            self.backfill.stop_model_locked(model)
            self._scheduler.schedule_task(
                now + _SESSION_CHECK_SECONDS, functools.partial(self._check_session_over, model)
            )
            self._fetch_service.wake_workers_locked()
        session.last_activity_at = now
        return session

    def _study_model(self, model: ModelShards, session: LoadSession) -> None:
        """At the beginning: headers, what others know, the recording."""
        if self._peer_profiles is not None and model.is_learning and not session.has_asked_peers:
            session.has_asked_peers = True
            self._fetch_service.queue_task(functools.partial(self._ask_peers, model, session))
            self._fetch_headers_if_due(model)
            return
        self._fetch_headers_if_due(model)
        if model.profile is not None:
            self._follow_profile(model, session)
        self._study_ended(model, session)

    def _fetch_headers_if_due(self, model: ModelShards) -> None:
        now = time.monotonic()
        with self._fetch_service.lock:
            if now - model.headers_fetched_at < _HEADERS_INTERVAL:
                return
            model.headers_fetched_at = now
        fetch_headers(self._fetch_service, model)

    def _ask_peers(self, model: ModelShards, session: LoadSession) -> None:
        assert self._peer_profiles is not None
        data = self._peer_profiles.find_profile(model.id)
        if data is not None and self._adopt_packed_profile(model, data, "of another node"):
            self.stats.from_nodes += 1
            if self._profile_store is not None:
                self._profile_store.save_profile(model.id, data)
            self._follow_profile(model, session)
        self._study_ended(model, session)

    def _study_ended(self, model: ModelShards, session: LoadSession) -> None:
        """It is known what there is to know: go on with the loads that were begun meanwhile."""
        with self._fetch_service.lock:
            session.is_studied = True
            behind, session.plan_after = session.plan_after, None
            for number, version in enumerate(model.versions):
                object_fetch = self._fetch_service.find_fetch_locked(version.id)
                if object_fetch is None:
                    continue
                if not object_fetch.failure_count:
                    object_fetch.backoff_until = 0.0
                if object_fetch.prefetch_mask is None:
                    object_fetch.prefetch_mask = (
                        None if object_fetch.stored.is_unattested else model.prefetch_mask_of(number)
                    )
                    if object_fetch.prefetch_mask is not None:
                        self._scheduler.drop_file(object_fetch)
            self._fetch_service.wake_workers_locked()
        if behind is not None and model.profile is None:
            self._shard_prefetcher.plan_after(*behind)

    def _follow_profile(self, model: ModelShards, session: LoadSession) -> None:
        """Follow the recording, as far as the budget reaches."""
        profile = model.profile
        assert profile is not None
        loads: dict[int, ObjectFetch] = {}
        for number in profile.file_order():
            try:
                loads[number] = self._fetch_service.acquire_fetch(model.versions[number], model.source)
            except FusecacheError as error:
                _log.warning("%s is not fetched ahead: %s", model.versions[number].key, error)
        steps, budget = [], self._settings.prefetch_budget
        for run in profile.runs:
            budget -= (run.stop - run.start) * model.block_size
            if budget < 0:
                break
            if run.file in loads:
                steps.append((loads[run.file], range(run.start, run.stop)))
        # nodes that start together would ask one owner for the same stripe: there, all of it comes in each node's order
        shared = model.needed_blocks is None and any(
            object_fetch.route is not None for object_fetch in loads.values()
        )
        replay = OrderedRuns([] if shared else steps)
        with self._fetch_service.lock:
            cold = any(object_fetch.idle.find(1, run.start, run.stop) >= 0 for object_fetch, run in steps)
            if cold:
                self.stats.replayed += 1
            followed = (
                session is model.session
                and not session.is_profile_wrong
                and not self._scheduler.is_prefetch_paused
            )
            if followed:
                session.ordered_runs = replay
                self._scheduler.ordered_runs.append(replay)
                self._fetch_service.wake_workers_locked()
        if cold:
            _log.info(
                "%s: following the recording of an earlier load: %d of %d blocks in %d files",
                model.versions[0].key,
                profile.block_count,
                sum(model.block_counts),
                len(loads),
            )
        if shared and followed:
            self._shard_prefetcher.prefetch_files(
                [
                    (object_fetch.version, object_fetch.source)
                    for object_fetch in dict.fromkeys(object_fetch for object_fetch, _ in steps)
                ]
            )
        for object_fetch in loads.values():
            if not followed or object_fetch not in replay.fetches:
                self._fetch_service.release_fetch(object_fetch)

    def _check_session_over(self, model: ModelShards) -> None:
        """Whether the load is over."""
        now = time.monotonic()
        with self._fetch_service.lock:
            session = model.session
            if session is None:
                return
            loads = [self._fetch_service.find_fetch_locked(version.id) for version in model.versions]
            waited_for = any(
                object_fetch is not None and object_fetch.waiters_by_block for object_fetch in loads
            )
            session.last_activity_at = (
                now if waited_for else max(session.last_activity_at, model.last_read_at)
            )
            over = session.is_over(now)
            if over:
                model.session = model.recorder = None
            else:
                self._scheduler.schedule_task(
                    now + _SESSION_CHECK_SECONDS, functools.partial(self._check_session_over, model)
                )
                self._fetch_service.wake_workers_locked()
            done = self._end_runs_locked(session, over)
        for object_fetch in done:
            self._fetch_service.release_fetch(object_fetch)
        if over:
            self._end_session(model, session)

    def _end_runs_locked(self, session: LoadSession, is_over: bool) -> Sequence[ObjectFetch]:
        """The loads to release, if it was followed to its end, or nobody reads any more. With the lock."""
        replay = session.ordered_runs
        if replay is None or not (is_over or session.is_profile_wrong or replay.is_done):
            return []
        session.ordered_runs = None
        with contextlib.suppress(ValueError):
            self._scheduler.ordered_runs.remove(replay)
        return replay.fetches

    def _end_session(self, model: ModelShards, session: LoadSession) -> None:
        self._keep_profile(model, session)
        if not session.is_profile_wrong and model.needed_blocks is not None:
            sparse = [number for number, mark in enumerate(model.needed_blocks) if 0 in mark]
            self.backfill.add_files((model.versions[number], model.source) for number in sparse)
        model.layouts.clear()
        self._shard_prefetcher.forget_plans(version.id for version in model.versions)

    def _keep_profile(self, model: ModelShards, session: LoadSession) -> None:
        """Make what was taken down the model's recording, if it needs one."""
        if (
            session.recorder is None
            or not session.is_cold
            or (model.profile is not None and not session.is_profile_wrong)
        ):
            return
        profile = session.recorder.make_profile(model.layouts)
        if profile is None or self._profile_store is None:
            return
        self._profile_store.save_profile(model.id, pack_profile(profile))
        with self._fetch_service.lock:
            model.adopt_profile(profile)
            self.stats.recorded += 1
        _log.info(
            "%s: recorded in which order it is read: %d of %d blocks, by %d processes",
            model.versions[0].key,
            profile.block_count,
            sum(model.block_counts),
            profile.rank_count,
        )
        if self._peer_profiles is not None:
            self._peer_profiles.offer_profile(model.id)

    def close(self) -> None:
        """Keep what was taken down of loads that are over: nobody has a file of theirs open. Does disk I/O."""
        with self._fetch_service.lock:
            models = {id(model): model for model in self._models.values() if model is not None}
            ended = [(model, model.session) for model in models.values() if model.session is not None]
            for model, _ in ended:
                model.session = model.recorder = None
        for model, session in ended:
            if not session.open_files:
                self._keep_profile(model, session)
