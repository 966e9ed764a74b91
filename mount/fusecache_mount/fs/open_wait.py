"""Opens that wait: until their file is complete, if that will not take long, or until somebody vouches for it."""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import trio

from fusecache.attest.inspector import ManifestInspector
from fusecache.catalog.catalog import Catalog
from fusecache.catalog.entry import Entry
from fusecache.errors import VersionChangedError
from fusecache.events import EventHub
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.service import FetchService
from fusecache.fetch.waiter import Waiter
from fusecache.types import ObjectId, ObjectVersion
from fusecache_mount.fs.background_jobs import BackgroundJobs

_POLL_SECONDS = 0.05
"""Seconds between two looks at how fast the file comes that an open waits for."""
_DOUBT_SECONDS = 0.5
"""Seconds for which the end must look too far away before it is believed. The pace of a network is no better known
sooner: its first connections are still growing, or it just paused, and then every open of that moment would be answered
too early, and its file read through the daemon to its end."""


class OpenWaitPolicy:
    """When to give up one wait that began at `started_at` and takes `limit_seconds` in all, give or take half a second.
    Pure; the caller has the clock, in seconds.

    | From | By a look at the rest | To |
    |---|---|---|
    | confident | it will come in time, or nobody knows | confident |
    | confident | it will come too late | doubtful |
    | doubtful | it will come in time | confident |
    | doubtful for _DOUBT_SECONDS | it will come too late | over |
    | any | it does not come at all | over |
    """

    def __init__(self, limit_seconds: float, started_at: float) -> None:
        self._limit_seconds = limit_seconds
        self._started_at = started_at
        self._doubtful_since: float | None = None

    def check_wait_over(self, now: float, seconds_left: float | None) -> bool:
        """Whether to wait no longer, when the rest takes `seconds_left` more seconds: infinity if it does not come at
        all, None if nobody knows."""
        if seconds_left == math.inf:
            return True
        if now - self._started_at + (seconds_left or 0.0) <= self._limit_seconds:
            self._doubtful_since = None
            return False
        if self._doubtful_since is None:
            self._doubtful_since = now
        return now - self._doubtful_since >= _DOUBT_SECONDS


@dataclass
class _CompletionWait:
    """The opens that wait for one version, and what wakes them all."""

    token: trio.lowlevel.TrioToken
    completed: trio.Event
    opener_count: int = 0


class OpenWait:
    """Has a file of weights fetched before it is opened, if that takes no longer than `limit_seconds`; 0: never. Which
    files it waits for, `waits_for` says by their keys.

    Read through passthrough, the bytes of a file are copied once; through the daemon, while they arrive, three times
    (socket, store, FUSE page cache) and with a round trip per MiB: on a machine whose CPUs are the limit a cold load
    took 1.5 to 1.9 times as long as the download alone that way.

    Of the event loop, but for `_version_completed`, which any thread may call: it looks a version up once (a single
    dictionary operation) and leaves the rest to the event loop.

    | A version | By | It is |
    |---|---|---|
    | not waited for | the first opener comes | waited for |
    | waited for | another opener comes | waited for, by one more; both wake by the same event |
    | waited for | an opener leaves, in time or not | waited for by one less; not waited for after the last one |
    | waited for | it is completed | waited for until its openers have left; they are woken |
    """

    def __init__(
        self,
        fetch_service: FetchService,
        jobs: BackgroundJobs,
        events: EventHub,
        *,
        limit_seconds: float,
        waits_for: Callable[[str], bool],
        limiter: trio.CapacityLimiter,
    ) -> None:
        self._fetch_service = fetch_service
        self._jobs = jobs
        self._limit_seconds = limit_seconds
        self._waits_for = waits_for
        self._limiter = limiter
        self._waits: dict[ObjectId, _CompletionWait] = {}
        events.object_completed.subscribe(self._version_completed)

    def should_wait(self, version: ObjectVersion) -> bool:
        """Whether an open of this version is to wait, if it is not complete."""
        return bool(self._limit_seconds and version.size and self._waits_for(version.key))

    async def await_completion(self, version: ObjectVersion, source: str) -> ObjectFetch:
        """Wait until the version is complete, or it is clear that this takes too long. Returns its fetch, opened once
        more, which the caller releases after the open: what it verified is known as long as it is open. Raises
        FusecacheError when not even an empty place in the cache can be had."""
        object_fetch = await trio.to_thread.run_sync(
            self._fetch_service.open_object, version, source, limiter=self._limiter
        )
        wait = self._waits.get(version.id)
        if wait is None:
            wait = _CompletionWait(trio.lowlevel.current_trio_token(), trio.Event())
            self._waits[version.id] = wait
        wait.opener_count += 1
        try:
            await self._poll_until_over(object_fetch, wait.completed)
        except BaseException:
            self._jobs.run_in_background(functools.partial(self._fetch_service.release_fetch, object_fetch))
            raise
        finally:
            wait.opener_count -= 1
            if not wait.opener_count:
                del self._waits[version.id]
        return object_fetch

    async def _poll_until_over(self, object_fetch: ObjectFetch, completed: trio.Event) -> None:
        self._fetch_service.fetch_whole_file(object_fetch)
        policy = OpenWaitPolicy(self._limit_seconds, trio.current_time())
        while not object_fetch.stored.is_complete:
            seconds_left = self._fetch_service.seconds_until_complete(object_fetch)
            if policy.check_wait_over(trio.current_time(), seconds_left):
                return
            with trio.move_on_after(_POLL_SECONDS):
                await completed.wait()

    def _version_completed(self, version: ObjectVersion) -> None:
        wait = self._waits.get(version.id)
        if wait is not None:
            with contextlib.suppress(trio.RunFinishedError):
                wait.token.run_sync_soon(wait.completed.set)


class AttestationWait:
    """Has a file that nobody vouched for fetched, and compared with its manifest, before it is opened. Of the event
    loop, but for `is_awaited`, which any thread may call: it reads one number."""

    def __init__(
        self,
        catalog: Catalog,
        fetch_service: FetchService,
        jobs: BackgroundJobs,
        inspector: ManifestInspector,
        *,
        limiter: trio.CapacityLimiter,
    ) -> None:
        self._catalog = catalog
        self._fetch_service = fetch_service
        self._jobs = jobs
        self._inspector = inspector
        self._limiter = limiter
        self._opens_by_nodeid: Counter[int] = Counter()
        """Base nodeid -> opens that wait."""

    def is_awaited(self, base_nodeid: int) -> bool:
        """Whether an open of this file waits, which may take as long as a fetch."""
        return self._opens_by_nodeid[base_nodeid] > 0

    async def await_attestation(self, entry: Entry, version: ObjectVersion) -> ObjectFetch:
        """Wait until somebody vouches for the version, which is that of `entry`. Returns its fetch, opened once more,
        which the caller releases after the open. Raises AttestationError when it is not what its manifest says,
        UnavailableError when nothing came for the deadline, and VersionChangedError when the origin has another version
        by now."""
        try:
            object_fetch = await trio.to_thread.run_sync(
                self._inspector.open_attestable, version, entry.source, limiter=self._limiter
            )
        except VersionChangedError:
            self._catalog.listings.report_stale_version(entry)
            raise
        token, settled = trio.lowlevel.current_trio_token(), trio.Event()

        def wake_opener(_waiter: Waiter) -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(settled.set)

        self._opens_by_nodeid[entry.nodeid] += 1
        waiter = None
        try:
            waiter = self._fetch_service.await_attestation(object_fetch, wake_opener)
            if waiter is not None:
                await settled.wait()
                if waiter.error is not None:
                    raise waiter.error
        except BaseException:
            if waiter is not None:
                self._fetch_service.cancel_waiter(waiter)
            self._jobs.run_in_background(functools.partial(self._fetch_service.release_fetch, object_fetch))
            raise
        finally:
            self._opens_by_nodeid -= Counter((entry.nodeid,))
        return object_fetch
