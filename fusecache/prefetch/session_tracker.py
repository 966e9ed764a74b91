"""Loads of models: when one begins, and when it is over.

The first open or read of a shard begins a *session* of its model. While a session lasts the reads of its files are
recorded; when no program reads any more, the recording becomes the model's profile, if it has none, or if the one that
was followed was wrong. A load of a model that is complete in the store has no session: there is nothing to fetch and
nothing to record.

| Session | Event | Next state |
|---|---|---|
| none | a file is opened or read, and not all files of the model are complete | begun: its reads are recorded |
| begun | the first file is read | its study is planned (`profile_follower.py`) |
| begun | a look finds no open file and 3 s of silence, or 60 s of silence | over: the recording is kept |
| begun | the mount goes away | over: the recording is kept if no file is open |
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence

from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.service import FetchService
from fusecache.prefetch.backfill import Backfill
from fusecache.prefetch.model_registry import ModelRegistry
from fusecache.prefetch.model_shards import LoadSession, ModelShards
from fusecache.prefetch.profile_keeper import ProfileKeeper
from fusecache.prefetch.profiles.recorder import ProfileRecorder
from fusecache.prefetch.shard_prefetcher import ShardPrefetcher
from fusecache.types import ObjectVersion

_SESSION_CHECK_SECONDS = 1.0
"""Seconds between looks at whether a load is over."""


class SessionTracker:
    """The scheduling lock of the service guards all sessions; methods without `_locked` take it."""

    def __init__(
        self,
        fetch_service: FetchService,
        *,
        registry: ModelRegistry,
        keeper: ProfileKeeper,
        backfill: Backfill,
        shard_prefetcher: ShardPrefetcher,
    ) -> None:
        self._fetch_service = fetch_service
        self._lock = fetch_service.lock
        self._registry = registry
        self._keeper = keeper
        self._backfill = backfill
        self._shard_prefetcher = shard_prefetcher

    def current_session_locked(self, model: ModelShards) -> LoadSession:
        """The session that is going on, or a new one; it has time from now on."""
        self._lock.assert_held()
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
            model.stray_counts.clear()
            self._backfill.stop_model_locked(model)
            self._check_later_locked(model, now)
        session.last_activity_at = now
        return session

    def file_opened(self, version: ObjectVersion, *, is_passthrough: bool) -> bool:
        """A program opened a file, whose reads the kernel answers if `is_passthrough`. Returns whether `file_closed` is
        to be called for it. May do disk I/O."""
        file = self._registry.find_file(version.id)
        if file is None or (is_passthrough and self._registry.is_stored_whole(file.model)):
            return False
        with self._lock:
            session = self.current_session_locked(file.model)
            session.open_files += 1
            session.has_opened_file = True
            session.is_cold = session.is_cold or not is_passthrough
            recorder = session.recorder
        if recorder is not None:
            recorder.file_opened(file.number, is_passthrough=is_passthrough)
        return True

    def file_closed(self, version: ObjectVersion) -> None:
        """The last program that had this file open closed it."""
        with self._lock:
            file = self._registry.find_file(version.id)
            if file is not None and file.model.session is not None:
                session = file.model.session
                session.open_files = max(0, session.open_files - 1)
                session.last_activity_at = time.monotonic()

    def _check_later_locked(self, model: ModelShards, now: float) -> None:
        self._fetch_service.dispatcher.run_at_locked(
            now + _SESSION_CHECK_SECONDS, functools.partial(self._check_session_over, model)
        )

    def _check_session_over(self, model: ModelShards) -> None:
        """End the session if its time is over. In a thread that fetches."""
        now = time.monotonic()
        with self._lock:
            session = model.session
            if session is None:
                return
            fetches = [self._fetch_service.fetches.find_locked(version.id) for version in model.versions]
            is_waited_for = any(
                object_fetch is not None and object_fetch.waiters.by_block for object_fetch in fetches
            )
            session.last_activity_at = (
                now if is_waited_for else max(session.last_activity_at, model.last_read_at)
            )
            is_over = session.is_over(now)
            if is_over:
                model.session = model.recorder = None
            else:
                self._check_later_locked(model, now)
            done = self._end_runs_locked(session, is_over)
        for object_fetch in done:
            self._fetch_service.release_fetch(object_fetch)
        if is_over:
            self._end_session(model, session)

    def _end_runs_locked(self, session: LoadSession, is_over: bool) -> Sequence[ObjectFetch]:
        """Stop following the profile if it was followed to its end, is wrong, or the session is over; returns the
        fetches to release."""
        runs = session.ordered_runs
        if runs is None or not (is_over or session.is_profile_wrong or runs.is_done):
            return []
        session.ordered_runs = None
        with contextlib.suppress(ValueError):
            self._fetch_service.scheduler.prefetches.ordered_runs.remove(runs)
        return runs.fetches

    def _end_session(self, model: ModelShards, session: LoadSession) -> None:
        self._keeper.keep_recording(model, session)
        if not session.is_profile_wrong and model.needed_blocks is not None:
            sparse = [number for number, mark in enumerate(model.needed_blocks) if 0 in mark]
            self._backfill.add_files((model.versions[number], model.source) for number in sparse)
        model.layouts.clear()
        self._shard_prefetcher.forget_plans(version.id for version in model.versions)

    def close(self) -> None:
        """Keep what was recorded of loads of which no file is open. Does disk I/O."""
        with self._lock:
            ended = [
                (model, model.session)
                for model in self._registry.models_locked()
                if model.session is not None
            ]
            for model, _ in ended:
                model.session = model.recorder = None
        for model, session in ended:
            if not session.open_files:
                self._keeper.keep_recording(model, session)
