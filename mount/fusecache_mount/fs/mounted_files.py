"""The open files of one mount, as the channel and the operations see them.

Each part guards a state of its own:

| Part | Holds | Under |
|---|---|---|
| OpenFileTable | which nodeid is open, how often | its lock, never across I/O |
| FileOpener, PassthroughOpener | the I/O of opening; complete versions | `opening_lock`, taken before the table's |
| OpenWait, AttestationWait, StaleRetryTracker | opens that wait, opens that come back | the event loop |
| OpenReporter | the first and the last open of each file are told | the background thread |

A channel thread that read an OPEN of a passthrough nodeid opens it itself (`open_passthrough`): through pyfuse3, the
event loop and a worker it took 1 to 5 ms, and `torch.load(mmap=True)` opens every file twice. The observer of reads is
told by the background thread, which is woken after the reply: until then the two would compete for the GIL.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import trio

from fusecache.attest.inspector import ManifestInspector
from fusecache.catalog.catalog import Catalog
from fusecache.catalog.entry import Entry
from fusecache.errors import VersionChangedError
from fusecache.events import EventHub
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.read_observer import ReadObserver
from fusecache.fetch.service import FetchService
from fusecache.locking import OwnedLock
from fusecache.store.interface import BlockStore
from fusecache.types import ObjectVersion
from fusecache_mount.device.backings import Backings, PassthroughState
from fusecache_mount.device.trace_switch import TraceSwitch
from fusecache_mount.fs.background_jobs import BackgroundJobs
from fusecache_mount.fs.file_opener import FileOpener
from fusecache_mount.fs.journal import OpenFileJournal
from fusecache_mount.fs.open_files import OpenFileTable, OpenStats
from fusecache_mount.fs.open_reports import OpenReporter
from fusecache_mount.fs.open_wait import AttestationWait, OpenWait
from fusecache_mount.fs.passthrough_opener import PassthroughOpener
from fusecache_mount.fs.stale_retries import StaleRetryTracker
from fusecache_mount.kernel.errnos import WrongNodeidError
from fusecache_mount.kernel.nodeids import inode_number, is_passthrough, passthrough_nodeid

_MAX_OPENING_THREADS = 4


class MountedFiles:
    """The open files. Built by `build_mounted_files`; `close` it. Thread-safe, but for the coroutines and
    `record_stale_answer`, which are of the event loop."""

    def __init__(
        self,
        catalog: Catalog,
        store: BlockStore,
        table: OpenFileTable,
        *,
        opener: FileOpener,
        passthrough: PassthroughOpener,
        reporter: OpenReporter,
        jobs: BackgroundJobs,
        open_wait: OpenWait,
        attestation_wait: AttestationWait | None,
        limiter: trio.CapacityLimiter,
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._table = table
        self._opener = opener
        self._passthrough = passthrough
        self._reporter = reporter
        self._jobs = jobs
        self._open_wait = open_wait
        self._attestation_wait = attestation_wait
        self._limiter = limiter
        self._stale_retries = StaleRetryTracker()

    def close(self) -> None:
        """Give back what open files hold, after the background jobs have ended; the kernel's handles go on by
        themselves. May block on the disk."""
        for file in self._table.clear():
            self._reporter.release_resources(file)

    @property
    def stats(self) -> OpenStats:
        """Opens since the start of this daemon."""
        return self._table.stats

    @property
    def passthrough_state(self) -> PassthroughState:
        """Whether passthrough is in use, and why."""
        return self._passthrough.state

    def count_open_nodeids(self) -> tuple[int, int]:
        """Nodeids that are open: with passthrough, and through the daemon."""
        return self._table.count_open_nodeids()

    # -- what the operations ask

    def resolves_to_passthrough(self, version: ObjectVersion) -> bool:
        """Whether LOOKUP of a file of this version leads to its passthrough nodeid."""
        return self._passthrough.leads_to_passthrough(version)

    async def open(self, nodeid: int, tid: int) -> None:
        """Open either nodeid of a file, for this thread; may wait until the file is complete or attested. Raises
        WrongNodeidError when the other nodeid is the right one now, VersionChangedError when the version is gone,
        AttestationError when it is not what its manifest says, and StoreError when not even an empty place in the
        cache can be had."""
        entry = self._catalog.nodes.entry_by_nodeid(inode_number(nodeid))
        path = entry.path if entry is not None else None
        is_retry = self._stale_retries.is_retry(path, tid)
        held_fetch = None
        try:
            if entry is not None:
                held_fetch = await self._wait_before_open(nodeid, entry, is_retry)
            work = functools.partial(self._opener.open_nodeid, nodeid, may_answer_stale=not is_retry)
            await trio.to_thread.run_sync(work, limiter=self._limiter)
        except (VersionChangedError, WrongNodeidError):
            self.record_stale_answer(path, tid)
            raise
        finally:
            if held_fetch is not None:
                self._jobs.run_in_background(functools.partial(self._reporter.release_fetch, held_fetch))

    async def _wait_before_open(self, nodeid: int, entry: Entry, is_retry: bool) -> ObjectFetch | None:
        """Wait as long as this open has to; returns the fetch to hold until it is opened, if there is one."""
        version = entry.version
        if version is None:
            return None
        if self._attestation_wait is not None:
            if is_passthrough(nodeid) and self._table.get(nodeid) is not None:
                return None
            return await self._attestation_wait.await_attestation(entry, version)
        if (
            is_retry
            or is_passthrough(nodeid)
            or not self._open_wait.should_wait(version)
            or not self._passthrough.is_allowed
            or self._passthrough.is_known_complete(version)
            or self._table.get(entry.nodeid) is not None
        ):
            return None
        return await self._open_wait.await_completion(version, entry.source)

    def record_stale_answer(self, path: str | None, tid: int) -> None:
        """This thread's open of this path (None: it is not known) is answered ESTALE: the VFS comes back once."""
        self._stale_retries.record_stale_answer(path, tid)

    async def read(self, nodeid: int, offset: int, size: int) -> bytes:
        """Bytes for a READ that came through pyfuse3 after all. Raises FusecacheError."""
        return await trio.to_thread.run_sync(
            self._opener.read_bytes, nodeid, offset, size, abandon_on_cancel=True
        )

    def cached_bytes(self, nodeid: int, version: ObjectVersion) -> int:
        """Bytes in the store of the file with this base nodeid and version. Looks at the disk if it is not open."""
        for each in (nodeid, passthrough_nodeid(nodeid)):
            file = self._table.get(each)
            if file is not None:
                stored = file.stored or (file.object_fetch.stored if file.object_fetch else None)
                if stored is not None:
                    return stored.cached_bytes()
        stored = self._store.open(version)
        try:
            return stored.cached_bytes()
        finally:
            stored.close()

    def cache_usage(self) -> tuple[int, int]:
        """Bytes used, and the limit, of the cache. May look at the disk."""
        usage = self._store.usage()
        return usage.used, usage.limit

    # -- what the channel asks

    def get_object_fetch(self, nodeid: int) -> ObjectFetch:
        """The fetch behind a nodeid that is open, also through an earlier daemon. Blocks on the disk at the first call
        for a nodeid. Raises FusecacheError."""
        return self._opener.get_object_fetch(nodeid)

    def open_passthrough(self, nodeid: int) -> int:
        """Open a passthrough nodeid, if nothing stands in the way; returns its backing, or 0: nothing was opened. May
        block on the store's disk."""
        if not self._catalog.index.is_current(inode_number(nodeid)):
            return 0
        return self._opener.open_passthrough(nodeid, may_prepare=self._attestation_wait is None)

    def open_answered(self, nodeid: int) -> None:
        """The reply to an `open_passthrough` is on its way: have the rest done in the background."""
        self._opener.follow_up(nodeid)

    def backing_id(self, nodeid: int) -> int:
        """The passthrough backing of this nodeid, 0 for none."""
        file = self._table.get(nodeid)
        return file.backing_id if file is not None else 0

    def is_awaiting_attestation(self, nodeid: int) -> bool:
        """Whether opens of this nodeid wait until somebody vouches for the file."""
        return self._attestation_wait is not None and self._attestation_wait.is_awaited(inode_number(nodeid))

    def release(self, nodeid: int) -> None:
        """One open less. After the last one, its resources are given back in the background. Does not block."""
        last = self._table.release(nodeid)
        self._jobs.run_in_background(lambda: self._table.record_release(nodeid))
        if last is not None:
            self._jobs.run_in_background(lambda: self._reporter.report_last_close(last))


def build_mounted_files(
    catalog: Catalog,
    fetch_service: FetchService,
    store: BlockStore,
    journal: OpenFileJournal,
    *,
    events: EventHub,
    jobs: BackgroundJobs,
    backings: Backings,
    passthrough_state: PassthroughState,
    trace_switch: TraceSwitch,
    read_observer: ReadObserver,
    open_wait_seconds: float,
    waits_for: Callable[[str], bool],
    set_read_ahead_limited: Callable[[bool], None],
    inspector: ManifestInspector | None,
) -> MountedFiles:
    """Put the parts together. An open of a file whose key `waits_for` accepts waits up to `open_wait_seconds` for the
    file to be complete; with an `inspector` every open waits for the attestation instead."""
    opening_lock = OwnedLock()
    limiter = trio.CapacityLimiter(_MAX_OPENING_THREADS)
    table = OpenFileTable(journal)
    reporter = OpenReporter(fetch_service, read_observer, backings)
    passthrough = PassthroughOpener(
        catalog,
        store,
        table,
        events,
        opening_lock=opening_lock,
        backings=backings,
        state=passthrough_state,
        trace_switch=trace_switch,
    )
    opener = FileOpener(
        catalog,
        fetch_service,
        store,
        table,
        opening_lock=opening_lock,
        passthrough=passthrough,
        reporter=reporter,
        jobs=jobs,
        read_observer=read_observer,
        set_read_ahead_limited=set_read_ahead_limited,
    )
    attestation_wait = None
    if inspector is not None:
        attestation_wait = AttestationWait(catalog, fetch_service, jobs, inspector, limiter=limiter)
    return MountedFiles(
        catalog,
        store,
        table,
        opener=opener,
        passthrough=passthrough,
        reporter=reporter,
        jobs=jobs,
        open_wait=OpenWait(
            fetch_service,
            jobs,
            events,
            limit_seconds=open_wait_seconds,
            waits_for=waits_for,
            limiter=limiter,
        ),
        attestation_wait=attestation_wait,
        limiter=limiter,
    )
