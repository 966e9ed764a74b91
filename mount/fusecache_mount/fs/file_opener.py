"""Opening a file, through the daemon or with passthrough, in a worker thread or in a thread of the channel."""

from __future__ import annotations

from collections.abc import Callable

from fusecache.catalog.catalog import Catalog
from fusecache.errors import FusecacheError
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.read_observer import ReadObserver
from fusecache.fetch.service import FetchService
from fusecache.locking import OwnedLock
from fusecache.store.interface import BlockStore
from fusecache_mount.fs.background_jobs import BackgroundJobs
from fusecache_mount.fs.journal import OpenRecord
from fusecache_mount.fs.open_files import OpenFile, OpenFileTable
from fusecache_mount.fs.open_reports import OpenReporter
from fusecache_mount.fs.passthrough_opener import PassthroughOpener, find_version
from fusecache_mount.fs.stale_retries import STALE_RETRY_SECONDS
from fusecache_mount.kernel.errnos import WrongNodeidError
from fusecache_mount.kernel.nodeids import is_passthrough


class FileOpener:
    """Opens files. `opening_lock` lets one thread at a time do the I/O of opening; methods whose name ends in `_locked`
    are called with it. Lock order: `opening_lock`, the table's lock. All methods may block on the store's disk."""

    def __init__(
        self,
        catalog: Catalog,
        fetch_service: FetchService,
        store: BlockStore,
        table: OpenFileTable,
        *,
        opening_lock: OwnedLock,
        passthrough: PassthroughOpener,
        reporter: OpenReporter,
        jobs: BackgroundJobs,
        read_observer: ReadObserver,
        set_read_ahead_limited: Callable[[bool], None],
    ) -> None:
        self._catalog = catalog
        self._fetch_service = fetch_service
        self._store = store
        self._table = table
        self._opening_lock = opening_lock
        self._passthrough = passthrough
        self._reporter = reporter
        self._jobs = jobs
        self._read_observer = read_observer
        self._set_read_ahead_limited = set_read_ahead_limited
        """Told, before an open is answered, whether the kernel is to read little ahead of its reader."""

    def open_nodeid(self, nodeid: int, *, may_answer_stale: bool) -> None:
        """Open either nodeid of a file. Raises WrongNodeidError when the other nodeid is the right one now (of a base
        only if `may_answer_stale`), VersionChangedError when the version is gone, and StoreError when not even an empty
        place in the cache can be had."""
        with self._opening_lock:
            self._drop_unopened_locked()
            if is_passthrough(nodeid):
                if self._table.is_inherited(nodeid) and self._table.get(nodeid) is None:
                    self._restore_handle_locked(nodeid)
                self._table.record_open(self._passthrough.open_locked(nodeid))
                self.follow_up(nodeid)
            else:
                self._open_through_daemon_locked(nodeid, may_answer_stale)

    def open_passthrough(self, nodeid: int, *, may_prepare: bool) -> int:
        """Open a passthrough nodeid once more, if that is all there is to do, or if it only has to be prepared and
        `may_prepare`. Returns its backing, or 0: nothing was opened, and `open_nodeid` has to find out what is to be
        done, or what is wrong."""
        file = self._table.join_passthrough_open(nodeid, must_have_backing=True)
        if file is None:
            if self._table.is_inherited(nodeid) or self._table.get(nodeid) is not None or not may_prepare:
                return 0
            try:
                with self._opening_lock:
                    file = self._passthrough.open_locked(nodeid)
            except FusecacheError:
                return 0
        self._table.record_open(file)
        return file.backing_id

    def follow_up(self, nodeid: int) -> None:
        """A passthrough open is answered: have done in the background what follows the first one. Does not block."""
        file = self._table.get(nodeid)
        if file is not None and not file.is_follow_up_done:
            self._jobs.run_in_background(lambda: self._reporter.report_passthrough_open(file))

    def get_object_fetch(self, nodeid: int) -> ObjectFetch:
        """The fetch behind a nodeid that is open, also through an earlier daemon. Blocks at its first call for a nodeid
        only. Raises FusecacheError."""
        file = self._table.get(nodeid)
        if file is not None and file.object_fetch is not None:
            return file.object_fetch
        with self._opening_lock:
            file = self._table.get(nodeid)
            if file is None:
                file = self._restore_handle_locked(nodeid)
            if file.object_fetch is None:
                file.object_fetch = self._fetch_service.open_object(file.version, file.source)
            return file.object_fetch

    def read_bytes(self, nodeid: int, offset: int, size: int) -> bytes:
        """Bytes of a nodeid that is open; short only at the end of the file. Blocks until they are there, or for the
        deadline of a read. Raises FusecacheError."""
        object_fetch = self.get_object_fetch(nodeid)
        length = max(0, min(size, object_fetch.version.size - offset))
        return self._fetch_service.read_bytes(object_fetch, offset, length) if length else b""

    def _open_through_daemon_locked(self, nodeid: int, may_answer_stale: bool) -> None:
        self._opening_lock.assert_held()
        file = self._table.get(nodeid)
        if file is None and self._table.is_inherited(nodeid):
            file = self._restore_handle_locked(nodeid)
        if file is None:
            version, source = find_version(self._catalog, nodeid)
            object_fetch = self._fetch_service.open_object(version, source)
            file = OpenFile(nodeid, version, source, object_fetch, None)
        object_fetch = file.object_fetch or self._fetch_service.open_object(file.version, file.source)
        file.object_fetch = object_fetch
        is_new = file.open_count == 0 and self._table.get(nodeid) is None
        try:
            if object_fetch.gone_error is not None and not object_fetch.stored.is_servable:
                raise object_fetch.gone_error
            if may_answer_stale and self._passthrough.switch_locked(file):
                self._jobs.run_later(STALE_RETRY_SECONDS, self._drop_unopened)
                raise WrongNodeidError(f"{file.version.key} is complete now: look it up again")
        except FusecacheError:
            if is_new:
                self._fetch_service.release_fetch(object_fetch)
            raise
        self._set_read_ahead_limited(self._read_observer.needs_exact_reads(object_fetch))
        if self._table.count_daemon_open(file):
            self._reporter.report_daemon_open(file)
        self._table.record_open(file)

    def _restore_handle_locked(self, nodeid: int) -> OpenFile:
        """Take over a nodeid that is open in the kernel since before this daemon started. Raises VersionChangedError
        when neither the journal nor the catalog knows it."""
        self._opening_lock.assert_held()
        record = self._table.take_inherited(nodeid)
        if record is None:
            version, source = find_version(self._catalog, nodeid)
            record = OpenRecord(version, source, 0, 1)
        stored = self._store.open(record.version) if is_passthrough(nodeid) else None
        file = OpenFile(
            nodeid, record.version, record.source, None, stored, record.backing_id, record.open_count
        )
        self._table.add(file)
        return file

    def _drop_unopened(self) -> None:
        with self._opening_lock:
            self._drop_unopened_locked()

    def _drop_unopened_locked(self) -> None:
        """Give up passthrough nodeids that were prepared and never opened: each keeps its object from being evicted."""
        self._opening_lock.assert_held()
        for file in self._table.drop_unopened():
            self._jobs.run_in_background(lambda file=file: self._reporter.release_resources(file))  # type: ignore[misc]
