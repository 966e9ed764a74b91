"""Opens with FUSE passthrough: which files can be had so, and the backings that the kernel reads for them.

Which nodeid a path leads to is decided at LOOKUP. When the decision is out of date at OPEN, the answer is ESTALE, on
which the VFS looks the path up again, once, and opens what it finds: so a file that became complete is served by
passthrough from its next open on, without waiting for old handles, and without a notification.

ESTALE must not come twice for one open(2). So the backing of the passthrough nodeid is prepared before the base is
answered ESTALE, and an open that comes back to a base all the same (through /proc/self/fd, say, or when the version was
replaced or evicted) is served as it is. An open that comes back is known by its thread, which is in its open(2) until
then: other ranks that open the same file at that moment are sent to the passthrough nodeid, too.
"""

from __future__ import annotations

import errno
import logging
import time

from fusecache.catalog.catalog import Catalog
from fusecache.errors import StoreError, VersionChangedError
from fusecache.events import EventHub
from fusecache.locking import OwnedLock
from fusecache.store.interface import BlockStore
from fusecache.types import ObjectId, ObjectVersion
from fusecache_mount.device.backings import Backings, PassthroughState
from fusecache_mount.device.trace_switch import TraceSwitch
from fusecache_mount.fs.open_files import OpenFile, OpenFileTable
from fusecache_mount.kernel.errnos import WrongNodeidError
from fusecache_mount.kernel.nodeids import inode_number, passthrough_nodeid

_log = logging.getLogger(__name__)


def find_version(catalog: Catalog, nodeid: int) -> tuple[ObjectVersion, str]:
    """The version behind either nodeid of a file, and its source. Raises VersionChangedError when the catalog does not
    know it any more."""
    entry = catalog.nodes.entry_by_nodeid(inode_number(nodeid))
    if entry is None or entry.version is None:
        raise VersionChangedError("the file changed at the origin: look it up again")
    return entry.version, entry.source


class PassthroughOpener:
    """Prepares and opens passthrough nodeids. Methods whose name ends in `_locked` are called with `opening_lock`: one
    thread at a time does the I/O of opening, so that no file is prepared twice. The two sets of versions are used
    without it (single operations).

    | A version | By | It is |
    |---|---|---|
    | unknown | `object_completed`, or an open found it complete | complete: LOOKUP leads to the passthrough nodeid |
    | complete | an open finds that it is not, or not any more | unknown |
    | any | the kernel refuses its data file | refused, for good: the daemon serves it |
    """

    def __init__(
        self,
        catalog: Catalog,
        store: BlockStore,
        table: OpenFileTable,
        events: EventHub,
        *,
        opening_lock: OwnedLock,
        backings: Backings,
        state: PassthroughState,
        trace_switch: TraceSwitch,
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._table = table
        self._opening_lock = opening_lock
        self._backings = backings
        self.state = state
        self._trace_switch = trace_switch
        self._complete_versions: dict[ObjectId, None] = {}
        """Versions known to be complete and verified. A hint for LOOKUP: an open looks for itself."""
        self._refused_versions: set[ObjectId] = set()
        events.object_completed.subscribe(self._version_completed)

    def _version_completed(self, version: ObjectVersion) -> None:
        self._complete_versions[version.id] = None

    @property
    def is_allowed(self) -> bool:
        """Whether an open that comes now may be one with passthrough."""
        return self.state.is_active and not self._trace_switch.is_on

    def is_known_complete(self, version: ObjectVersion) -> bool:
        """Whether the version was complete when somebody last looked."""
        return version.id in self._complete_versions

    def is_refused(self, version: ObjectVersion) -> bool:
        """Whether the kernel did not take the data file of this version."""
        return version.id in self._refused_versions

    def leads_to_passthrough(self, version: ObjectVersion) -> bool:
        """Whether LOOKUP leads to the passthrough nodeid of a file of this version."""
        return self.is_allowed and self.is_known_complete(version) and not self.is_refused(version)

    def switch_locked(self, base: OpenFile) -> bool:
        """Whether this open of a base is to be repeated on the passthrough nodeid, which is prepared for it then. May
        block on the store's disk."""
        self._opening_lock.assert_held()
        assert base.object_fetch is not None
        if not (self.is_allowed and base.object_fetch.stored.is_servable and base.version.size):
            return False
        if self.is_refused(base.version):
            return False
        nodeid = passthrough_nodeid(base.nodeid)
        if self._table.get(nodeid) is None and not self._prepare_locked(nodeid, base.version, base.source):
            return False
        self._complete_versions[base.version.id] = None
        return True

    def open_locked(self, nodeid: int) -> OpenFile:
        """Open a passthrough nodeid once more, after it was prepared if need be. May block on the store's disk. Raises
        WrongNodeidError when the file is not complete any more, and VersionChangedError when the catalog does not know
        it any more."""
        self._opening_lock.assert_held()
        while (file := self._table.join_passthrough_open(nodeid)) is None:
            version, source = find_version(self._catalog, nodeid)
            if self.is_refused(version) or not self._prepare_locked(nodeid, version, source):
                self._complete_versions.pop(version.id, None)
                raise WrongNodeidError(f"{version.key} is not complete any more: look it up again")
        return file

    def _prepare_locked(self, nodeid: int, version: ObjectVersion, source: str) -> bool:
        """Enter a passthrough nodeid into the table, with its backing and no opens; False: it can't be had."""
        self._opening_lock.assert_held()
        try:
            stored = self._store.open(version)
        except StoreError:
            return False
        try:
            if not stored.is_servable or stored.is_retired:
                stored.close()
                return False
            stored.count_access()
            backing_id = self._backings.open_backing(stored.fileno())
        except OSError as error:
            stored.close()
            if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTTY):
                self.state.turn_off(f"the kernel refused it: {error.strerror}")
            else:
                _log.warning("%s: no passthrough for this file: %s", version.key, error.strerror)
            self._refused_versions.add(version.id)
            return False
        except StoreError:
            stored.close()
            return False
        self._table.add(
            OpenFile(nodeid, version, source, None, stored, backing_id, prepared_at=time.monotonic())
        )
        return True
