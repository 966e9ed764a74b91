"""After an open and a close: the observer of reads is told, and resources are given back."""

from __future__ import annotations

from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.read_observer import ReadObserver
from fusecache.fetch.service import FetchService
from fusecache_mount.device.backings import Backings
from fusecache_mount.fs.open_files import LastRelease, OpenFile


class OpenReporter:
    """Tells of opens and closes. Has no state but what it notes in each OpenFile; all of its methods may block on the
    store's disk, and those that follow a passthrough open or a close are called by the background thread only, so that
    they see one another's notes.

    | A file that is open | By | It becomes |
    |---|---|---|
    | not reported | `report_daemon_open`, `report_passthrough_open` | reported, if somebody listens |
    | reported | `report_last_close` | not reported; a report that comes later is dropped |
    """

    def __init__(self, fetch_service: FetchService, read_observer: ReadObserver, backings: Backings) -> None:
        self._fetch_service = fetch_service
        self._read_observer = read_observer
        self._backings = backings

    def report_daemon_open(self, file: OpenFile) -> None:
        """A base was opened for the first time: the daemon sees its reads."""
        file.is_open_reported = self._read_observer.file_opened(file.version, is_passthrough=False)

    def report_passthrough_open(self, file: OpenFile) -> None:
        """The kernel reads this file now. A second call, and one after the last close, do nothing."""
        if file.is_follow_up_done:
            return
        file.is_follow_up_done = True
        file.is_open_reported = self._read_observer.file_opened(file.version, is_passthrough=True)
        self._read_observer.whole_file_wanted(file.version, file.source)

    def report_last_close(self, last: LastRelease) -> None:
        """Nobody has this file open any more."""
        if last.backing_id:
            self._backings.close_backing(last.backing_id)
        file = last.file
        if file is None:
            return
        file.is_follow_up_done = True
        if file.is_open_reported:
            self._read_observer.file_closed(file.version)
        self.release_resources(file)

    def release_fetch(self, object_fetch: ObjectFetch) -> None:
        """Give back a fetch that was held while its file was opened."""
        self._fetch_service.release_fetch(object_fetch)

    def release_resources(self, file: OpenFile) -> None:
        """Give back what the file held: its backing, its object in the store, its fetch."""
        if file.backing_id:
            self._backings.close_backing(file.backing_id)
        if file.stored is not None:
            file.stored.close()
        if file.object_fetch is not None:
            self._fetch_service.release_fetch(file.object_fetch)
