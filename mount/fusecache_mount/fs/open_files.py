"""Open files: which nodeid is served how, and the passthrough backings of the kernel.

A file has two nodeids (see nodeids.py). The base is served by the daemon, from the store or through the loader;
the twin is opened with passthrough, when all of the file is in the store and verified. Which of them a path leads
to is decided at LOOKUP. When the decision is out of date at OPEN, the answer is ESTALE, on which the VFS looks the
path up again, once, and opens what it finds: so a file that became complete is served by passthrough from its
next open on, without waiting for old handles, and without a notification.

ESTALE must not come twice for one open(2). So the backing of the twin is prepared before the base is bounced; and an
open that comes back to a base all the same (through /proc/self/fd, say, or when the version was replaced or evicted) is
served as it is. Who comes back is known by the thread, which is in its open(2) until then (bounces.py): other ranks
that open the same file at that moment are sent to the twin, too.

A twin is opened by the channel's thread that read the OPEN (`open_whole`): through pyfuse3, the event loop and a worker
it took 1 to 5 ms, and `torch.load(mmap=True)` opens every file twice. What the loader makes of it is left to the
`chores` thread, and that is woken after the reply: until then the two would compete for the GIL.

Ownership: `_lock` guards the table; it is never held across I/O, so that the event loop may take it. `_opening`
lets one thread at a time do the I/O of opening. Closing is left to the `chores` thread. Lock order: `_opening`,
`_lock`. The channel's threads read the table without a lock (single dict operations). An open joins what is in the
table under `_lock` (`_join`): the last release may take it out at any moment.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from fusecache.attest.inspector import ManifestInspector
from fusecache.catalog.catalog import Catalog
from fusecache.catalog.entry import Entry
from fusecache.errors import FusecacheError, StoreError, VersionChangedError
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.service import FetchService
from fusecache.fetch.waiter import Waiter
from fusecache.prefetch.models.shard_order import is_shard
from fusecache.store.interface import BlockStore
from fusecache.types import ObjectId, ObjectVersion
from fusecache_mount.device.backings import Backings, PassthroughState
from fusecache_mount.device.trace_switch import TraceSwitch
from fusecache_mount.fs.journal import OpenFileJournal, OpenRecord
from fusecache_mount.fs.open_wait import OpenWaitPolicy
from fusecache_mount.fs.opens import OpenFile, OpenStats
from fusecache_mount.fs.stale_retries import STALE_RETRY_SECONDS, StaleRetryTracker
from fusecache_mount.kernel.nodeids import inode_number, is_passthrough, passthrough_nodeid

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = logging.getLogger(__name__)

_COMPLETION_POLL_SECONDS = 0.05
"""Seconds between looks at the pace of a fetch that an open waits for."""


class OpenFileTable:
    """The open files of one mount. `start` and `close` own the chores thread."""

    def __init__(
        self,
        catalog: Catalog,
        fetch_service: FetchService,
        store: BlockStore,
        journal: OpenFileJournal,
        *,
        backings: Backings,
        passthrough_state: PassthroughState,
        trace_switch: TraceSwitch,
        open_wait: float = 0.0,
        set_read_ahead_limited: Callable[[bool], None] | None = None,
        inspector: ManifestInspector | None = None,
    ) -> None:
        self._set_read_ahead_limited = set_read_ahead_limited
        """Told, before an open is answered, whether the kernel is to read little ahead of its reader."""
        self._trace_switch = trace_switch
        self._inspector = inspector
        self._attestation_waits: Counter[int] = Counter()
        """Base nodeid -> opens that wait until somebody vouches for the file. Of the event loop."""
        self._open_wait_seconds = open_wait
        self._completion_events: dict[ObjectId, trio.Event] = {}
        """Set when a version that an open waits for is complete."""
        self._trio_token: trio.lowlevel.TrioToken | None = None
        self.passthrough_state = passthrough_state
        self.stats = OpenStats()
        self._catalog = catalog
        self._fetch_service = fetch_service
        self._store = store
        self._journal = journal
        self._backings = backings
        self._files: dict[int, OpenFile] = {}
        self._inherited_opens: dict[int, OpenRecord] = dict(journal.inherited_opens)
        """Open in the kernel since before this daemon started, and not taken up yet."""
        self._complete_versions: dict[ObjectId, None] = {}
        """Versions known to be whole and verified, so that LOOKUP leads to the twin. A hint: OPEN looks itself."""
        self._refused_versions: set[ObjectId] = set()
        """Versions whose data file the kernel did not take for passthrough."""
        self._stale_retries = StaleRetryTracker()
        self._lock = threading.Lock()
        self._opening_lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._job_thread = threading.Thread(target=self._run_jobs, name="chores", daemon=True)
        self._limiter = trio.CapacityLimiter(4)

    # -- life

    def start(self) -> None:
        """Start the chores thread; from within trio.run()."""
        self._trio_token = trio.lowlevel.current_trio_token()
        self._job_thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """End the chores and close what is open here; the kernel's handles go on by themselves."""
        self._jobs.put(None)
        self._job_thread.join(timeout)
        with self._lock:
            files = list(self._files.values())
            self._files.clear()
        for file in files:
            self._release_resources(file)

    def run_in_background(self, job: Callable[[], None]) -> None:
        """Have something done that may block, off the event loop and outside of all requests."""
        self._jobs.put(job)

    def _run_jobs(self) -> None:
        while True:
            try:
                chore = self._jobs.get(timeout=STALE_RETRY_SECONDS if self._has_unopened_file() else None)
            except queue.Empty:
                chore = self._drop_unopened_files
            if chore is None:
                return
            try:
                chore()
            except Exception:
                _log.exception("a chore failed in an unforeseen way")

    def _has_unopened_file(self) -> bool:
        """Whether a twin is ready that nobody opened yet: it keeps its object from being evicted."""
        with self._lock:
            return any(file.open_count == 0 for file in self._files.values())

    def _drop_unopened_files(self) -> None:
        with self._opening_lock:
            self._drop_unopened_files_locked()

    @property
    def _is_passthrough_allowed(self) -> bool:
        """Whether an open that comes now may be one with passthrough."""
        return self.passthrough_state.is_active and not self._trace_switch.is_on

    def count_open_nodeids(self) -> tuple[int, int]:
        """Nodeids that are open: with passthrough, and through the daemon."""
        with self._lock:
            nodeids = [file.nodeid for file in self._files.values() if file.open_count]
            nodeids += [nodeid for nodeid in self._inherited_opens if nodeid not in self._files]
        passed = sum(map(is_passthrough, nodeids))
        return passed, len(nodeids) - passed

    # -- what the operations ask

    def resolves_to_passthrough(self, entry: Entry) -> bool:
        """Whether LOOKUP leads to the twin."""
        version = entry.version
        if version is None or not self._is_passthrough_allowed or version.id not in self._complete_versions:
            return False
        return version.id not in self._refused_versions

    async def open(self, nodeid: int, flags: int, tid: int) -> None:
        """Open a file, either twin, for this thread. Raises VersionChangedError when the other twin is the right one
        now, or the version is gone, and StoreError when not even an empty place in the cache can be had."""
        entry = self._catalog.nodes.entry_by_nodeid(inode_number(nodeid))
        path = entry.path if entry is not None else None
        second = self._stale_retries.is_retry(path, tid)
        object_fetch = None
        try:
            if entry is not None and self._inspector is not None:
                if not is_passthrough(nodeid) or nodeid not in self._files:
                    object_fetch = await self._await_attestation(entry, self._inspector)
            elif entry is not None and not second and not is_passthrough(nodeid):
                object_fetch = await self._await_completion(entry)
            await trio.to_thread.run_sync(self._open_nodeid, nodeid, not second, limiter=self._limiter)
        except VersionChangedError:
            self.record_stale_answer(path, tid)
            raise
        finally:
            if object_fetch is not None:
                self.run_in_background(functools.partial(self._fetch_service.release_fetch, object_fetch))

    def record_stale_answer(self, path: str | None, tid: int) -> None:
        """See operations.Handles."""
        self._stale_retries.record_stale_answer(path, tid)

    async def _await_attestation(self, entry: Entry, inspector: ManifestInspector) -> ObjectFetch | None:
        """Have a sealed file fetched, and held against its manifest. Raises AttestationError when it is not what that
        says, UnavailableError when nothing came for the deadline. Returns the load as `_wait_until_whole` does."""
        version, source = entry.version, entry.source
        if version is None:
            return None
        try:
            object_fetch = await trio.to_thread.run_sync(
                inspector.open_attestable, version, source, limiter=self._limiter
            )
        except VersionChangedError:
            self._catalog.listings.report_stale_version(entry)
            raise
        token, settled = trio.lowlevel.current_trio_token(), trio.Event()

        def tell(_waiter: Waiter) -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(settled.set)

        self._attestation_waits[entry.nodeid] += 1
        waiter = None
        try:
            waiter = self._fetch_service.await_attestation(object_fetch, tell)
            if waiter is not None:
                await settled.wait()
                if waiter.error is not None:
                    raise waiter.error
        except BaseException:
            if waiter is not None:
                self._fetch_service.cancel_waiter(waiter)
            self.run_in_background(functools.partial(self._fetch_service.release_fetch, object_fetch))
            raise
        finally:
            self._attestation_waits -= Counter((entry.nodeid,))
        return object_fetch

    def is_awaiting_attestation(self, nodeid: int) -> bool:
        """See channel.OpenFiles."""
        return self._attestation_waits[inode_number(nodeid)] > 0

    async def _await_completion(self, entry: Entry) -> ObjectFetch | None:
        """Have a file of weights fetched before it is opened, if that takes no longer than `open_wait`.

        Read through passthrough, its bytes are copied once; through the daemon, while they arrive, three times
        (socket, store, FUSE page cache) and a round trip per MiB: on a machine whose CPUs are the limit a cold
        load took 1.5 to 1.9 times as long as the download alone that way.

        Returns the load, opened once more, if there is one: what it verified is known as long as it is open.
        """
        version, source = entry.version, entry.source
        if not (
            self._open_wait_seconds
            and self._is_passthrough_allowed
            and version
            and version.size
            and is_shard(version.key)
        ):
            return None
        if version.id in self._complete_versions or entry.nodeid in self._files:
            return None
        object_fetch = await trio.to_thread.run_sync(
            self._fetch_service.open_object, version, source, limiter=self._limiter
        )
        whole = self._completion_events.setdefault(version.id, trio.Event())
        try:
            self._fetch_service.fetch_whole_file(object_fetch)
            patience = OpenWaitPolicy(self._open_wait_seconds, trio.current_time())
            while not object_fetch.stored.is_complete:
                if patience.check_wait_over(
                    trio.current_time(), self._fetch_service.seconds_until_complete(object_fetch)
                ):
                    break
                with trio.move_on_after(_COMPLETION_POLL_SECONDS):
                    await whole.wait()
        except BaseException:
            self.run_in_background(functools.partial(self._fetch_service.release_fetch, object_fetch))
            raise
        finally:
            self._completion_events.pop(version.id, None)
        return object_fetch

    def release(self, nodeid: int) -> None:
        """One open less. Does not block."""
        with self._lock:
            file = self._files.get(nodeid)
            if file is None:
                record = self._inherited_opens.get(nodeid)
                if record is not None:
                    record.open_count -= 1
                    if record.open_count <= 0:
                        del self._inherited_opens[nodeid]
                        if record.backing_id:
                            self._jobs.put(functools.partial(self._backings.close_backing, record.backing_id))
                self._jobs.put(lambda: self._journal.record_release(nodeid))
                return
            file.open_count -= 1
            last = file.open_count <= 0
            if last:
                del self._files[nodeid]
        self._jobs.put(lambda: self._journal.record_release(nodeid))
        if last:
            self._jobs.put(lambda: self._report_last_close(file))

    async def read(self, nodeid: int, offset: int, size: int) -> Buffer:
        """Bytes for a READ that came through pyfuse3 after all."""

        def work() -> bytes:
            object_fetch = self.get_object_fetch(nodeid)
            length = max(0, min(size, object_fetch.version.size - offset))
            return self._fetch_service.read_bytes(object_fetch, offset, length) if length else b""

        return await trio.to_thread.run_sync(work, abandon_on_cancel=True)

    def cached_bytes(self, entry: Entry) -> int:
        """Bytes of this file in the store, as far as this process knows without looking at the disk."""
        if entry.version is None:
            return 0
        for nodeid in (entry.nodeid, passthrough_nodeid(entry.nodeid)):
            file = self._files.get(nodeid)
            if file is not None:
                stored = file.stored or (file.object_fetch.stored if file.object_fetch else None)
                if stored is not None:
                    return stored.cached_bytes()
        stored = self._store.open(entry.version)
        try:
            return stored.cached_bytes()
        finally:
            stored.close()

    def cache_usage(self) -> tuple[int, int]:
        """Bytes used, and the limit, of the cache."""
        usage = self._store.usage()
        return usage.used, usage.limit

    # -- what the channel asks

    def get_object_fetch(self, nodeid: int) -> ObjectFetch:
        """See channel.OpenFiles. Takes up files that were opened through an earlier daemon."""
        file = self._files.get(nodeid)
        if file is not None and file.object_fetch is not None:
            return file.object_fetch
        with self._opening_lock:
            file = self._files.get(nodeid)
            if file is None:
                file = self._restore_handle_locked(nodeid)
            if file.object_fetch is None:
                file.object_fetch = self._fetch_service.open_object(file.version, file.source)
            return file.object_fetch

    def open_passthrough(self, nodeid: int) -> int:
        """See channel.OpenFiles."""
        if not self._catalog.index.is_current(inode_number(nodeid)):
            return 0
        file = self._join_passthrough_open(nodeid, must_have_backing=True)
        if file is None:
            if nodeid in self._inherited_opens or nodeid in self._files or self._inspector is not None:
                return 0
            try:
                with self._opening_lock:
                    file = self._acquire_passthrough_locked(nodeid)
            except FusecacheError:
                return 0  # it is opened once more, by who has the words for what is wrong
        self._journal.record_open(file.nodeid, file.version, file.source, file.backing_id)
        return file.backing_id

    def open_answered(self, nodeid: int) -> None:
        """See channel.OpenFiles."""
        file = self._files.get(nodeid)
        if file is not None and not file.is_follow_up_done:
            self.run_in_background(functools.partial(self._report_passthrough_open, file))

    def backing_id(self, nodeid: int) -> int:
        """See channel.OpenFiles."""
        file = self._files.get(nodeid)
        return file.backing_id if file is not None else 0

    def version_completed(self, version: ObjectVersion) -> None:
        """The loader has all of this version."""
        self._complete_versions[version.id] = None
        whole = self._completion_events.get(version.id)
        if whole is not None and self._trio_token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._trio_token.run_sync_soon(whole.set)

    # -- opening, in a thread

    def _open_nodeid(self, nodeid: int, may_answer_stale: bool) -> None:
        with self._opening_lock:
            self._drop_unopened_files_locked()
            if is_passthrough(nodeid):
                self._open_passthrough_locked(nodeid)
            else:
                self._open_through_daemon_locked(nodeid, may_answer_stale)

    def _open_through_daemon_locked(self, nodeid: int, may_answer_stale: bool) -> None:
        file = self._files.get(nodeid)
        if file is None and nodeid in self._inherited_opens:
            file = self._restore_handle_locked(nodeid)
        if file is None:
            version, source = self._find_version(nodeid)
            object_fetch = self._fetch_service.open_object(version, source)
            file = OpenFile(nodeid, version, source, object_fetch, None)
        object_fetch = file.object_fetch or self._fetch_service.open_object(file.version, file.source)
        file.object_fetch = object_fetch
        fresh = file.open_count == 0 and nodeid not in self._files
        try:
            if object_fetch.gone_error is not None and not object_fetch.stored.is_servable:
                raise object_fetch.gone_error
            if may_answer_stale and self._switch_to_passthrough_locked(file):
                self.stats.stale_answers += 1
                raise VersionChangedError(f"{file.version.key} is complete now: look it up again")
        except FusecacheError:
            if fresh:
                self._fetch_service.release_fetch(object_fetch)
            raise
        if self._set_read_ahead_limited is not None:
            self._set_read_ahead_limited(object_fetch.needs_exact_reads())
        self._count_daemon_open(file)

    def _switch_to_passthrough_locked(self, file: OpenFile) -> bool:
        """Whether this open of a base is to be repeated on the twin, which is ready for it then."""
        assert file.object_fetch is not None
        if not (self._is_passthrough_allowed and file.object_fetch.stored.is_servable and file.version.size):
            return False
        if file.version.id in self._refused_versions:
            return False
        twin = passthrough_nodeid(file.nodeid)
        if twin not in self._files and not self._prepare_passthrough_locked(twin, file.version, file.source):
            return False
        self._complete_versions[file.version.id] = None
        self._jobs.put(self._drop_unopened_files)  # has the thread look at the time from now on
        return True

    def _open_passthrough_locked(self, nodeid: int) -> None:
        if nodeid in self._inherited_opens and nodeid not in self._files:
            self._restore_handle_locked(nodeid)
        file = self._acquire_passthrough_locked(nodeid)
        self._journal.record_open(file.nodeid, file.version, file.source, file.backing_id)
        self.open_answered(nodeid)

    def _acquire_passthrough_locked(self, nodeid: int) -> OpenFile:
        """A twin, made ready if need be, and opened once more. Raises VersionChangedError."""
        while (file := self._join_passthrough_open(nodeid)) is None:
            version, source = self._find_version(nodeid)
            if (
                version.id in self._refused_versions
                or self._prepare_passthrough_locked(nodeid, version, source) is None
            ):
                self._complete_versions.pop(version.id, None)
                raise VersionChangedError(f"{version.key} is not complete any more: look it up again")
        return file

    def _join_passthrough_open(self, nodeid: int, *, must_have_backing: bool = False) -> OpenFile | None:
        """One more open of a twin that is in the table; None: it is not. `ready`: only of one that has its backing."""
        with self._lock:
            file = self._files.get(nodeid)
            if file is None or (must_have_backing and not file.backing_id):
                return None
            file.open_count += 1
            self.stats.passthrough_opens += 1
        return file

    def _prepare_passthrough_locked(
        self, nodeid: int, version: ObjectVersion, source: str
    ) -> OpenFile | None:
        """A twin with its backing, in the table with no opens; None: it can't be had."""
        try:
            stored = self._store.open(version)
        except StoreError:
            return None
        try:
            if not stored.is_servable or stored.is_retired:
                stored.close()
                return None
            stored.count_access()
            backing = self._backings.open_backing(stored.fileno())
        except OSError as error:
            stored.close()
            if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTTY):
                self.passthrough_state.turn_off(f"the kernel refused it: {error.strerror}")
            else:
                _log.warning("%s: no passthrough for this file: %s", version.key, error.strerror)
            self._refused_versions.add(version.id)
            return None
        except StoreError:
            stored.close()
            return None
        file = OpenFile(nodeid, version, source, None, stored, backing, prepared_at=time.monotonic())
        with self._lock:
            self._files[nodeid] = file
        return file

    def _count_daemon_open(self, file: OpenFile) -> None:
        """One more open of a base."""
        with self._lock:
            file.open_count += 1
            first = file.open_count == 1
            self._files[file.nodeid] = file
            self.stats.daemon_opens += 1
        if first:
            file.is_open_reported = self._fetch_service.session_tracker.file_opened(
                file.version, is_passthrough=False
            )
        self._journal.record_open(file.nodeid, file.version, file.source, file.backing_id)

    def _find_version(self, nodeid: int) -> tuple[ObjectVersion, str]:
        entry = self._catalog.nodes.entry_by_nodeid(inode_number(nodeid))
        if entry is None or entry.version is None:
            raise VersionChangedError("the file changed at the origin: look it up again")
        return entry.version, entry.source

    def _restore_handle_locked(self, nodeid: int) -> OpenFile:
        """A file that is open in the kernel since before this daemon started; `_opening` is held."""
        with self._lock:
            record = self._inherited_opens.pop(nodeid, None)
        if record is None:
            version, source = self._find_version(nodeid)
            record = OpenRecord(version, source, 0, 1)
        stored = None
        if is_passthrough(nodeid):
            stored = self._store.open(record.version)
        file = OpenFile(
            nodeid, record.version, record.source, None, stored, record.backing_id, record.open_count
        )
        with self._lock:
            self._files[nodeid] = file
        return file

    def _drop_unopened_files_locked(self) -> None:
        """Drop twins that were prepared and never opened."""
        now = time.monotonic()
        with self._lock:
            stale = [
                file
                for file in self._files.values()
                if file.open_count == 0
                and is_passthrough(file.nodeid)
                and now - file.prepared_at > STALE_RETRY_SECONDS
            ]
            for file in stale:
                del self._files[file.nodeid]
        for file in stale:
            self._jobs.put(lambda file=file: self._release_resources(file))  # type: ignore[misc]

    # -- after opening and closing, in the chores thread

    def _report_passthrough_open(self, file: OpenFile) -> None:
        """The kernel reads this file now: see to what is read with it."""
        if file.is_follow_up_done:
            return
        file.is_follow_up_done = True
        file.is_open_reported = self._fetch_service.session_tracker.file_opened(
            file.version, is_passthrough=True
        )
        self._fetch_service.file_read(file.version, file.source)

    def _report_last_close(self, file: OpenFile) -> None:
        file.is_follow_up_done = True
        if file.is_open_reported:
            self._fetch_service.session_tracker.file_closed(file.version)
        self._release_resources(file)

    def _release_resources(self, file: OpenFile) -> None:
        if file.backing_id:
            self._backings.close_backing(file.backing_id)
        if file.stored is not None:
            file.stored.close()
        if file.object_fetch is not None:
            self._fetch_service.release_fetch(file.object_fetch)
