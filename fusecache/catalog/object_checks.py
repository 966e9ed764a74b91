"""Single objects whose version is doubted: the origin is asked for each of them alone."""

from __future__ import annotations

import logging

import trio

from fusecache.catalog.entry import Entry
from fusecache.catalog.shared_request import REQUEST_WAIT, SharedRequest
from fusecache.catalog.source_tree import SourceTree
from fusecache.errors import NotFoundError, OriginError
from fusecache.types import ObjectVersion

_log = logging.getLogger(__name__)


class ObjectChecks:
    """The doubted entries of one source. Belongs to the event loop, but for `doubt_version`, which any thread may call.

    | What happens | The entry |
    |---|---|
    | a reader finds that the origin no longer has its version: `doubt_version` | is in doubt |
    | `start_check`, or a LOOKUP that waits | is in doubt, and the origin is asked |
    | the origin answers with the same version, or fails | is out of doubt |
    | the origin answers with another version, or none | leaves the tree; one of the new version takes its place |
    """

    def __init__(self, tree: SourceTree, limiter: trio.CapacityLimiter) -> None:
        self._tree = tree
        self._limiter = limiter
        self._doubted_nodeids: set[int] = set()
        """Any thread adds to it; only the event loop removes."""
        self._running_checks: dict[int, SharedRequest] = {}

    def doubt_version(self, entry: Entry) -> bool:
        """Note that the origin no longer has the version of this entry; returns whether the entry is in the tree still.
        Thread-safe; `start_check` has to follow on the event loop."""
        if entry.version is None or not self._tree.has_entry(entry):
            return False
        self._doubted_nodeids.add(entry.nodeid)
        return True

    def is_in_doubt(self, entry: Entry) -> bool:
        """Whether the version of this entry is doubted, and the origin has not answered yet."""
        return entry.nodeid in self._doubted_nodeids

    def start_check(self, entry: Entry) -> None:
        """Ask the origin for the object of this entry, unless that is under way."""
        if not self._tree.has_entry(entry):
            self._doubted_nodeids.discard(entry.nodeid)
        elif entry.nodeid not in self._running_checks:
            self._running_checks[entry.nodeid] = request = SharedRequest()
            trio.lowlevel.spawn_system_task(self._check_object, entry, request, name=f"stat {entry.path}")

    async def wait_for_check(self, entry: Entry) -> None:
        """Wait for the origin's answer until REQUEST_WAIT seconds after the request began; begins it if need be."""
        if self.is_in_doubt(entry):
            self.start_check(entry)
            request = self._running_checks.get(entry.nodeid)
            if request is not None:
                await request.wait_until_done(REQUEST_WAIT)

    async def _check_object(self, entry: Entry, request: SharedRequest) -> None:
        assert entry.version is not None
        try:
            version = await trio.to_thread.run_sync(
                self._find_version, entry.version.key, abandon_on_cancel=True, limiter=self._limiter
            )
            if version != entry.version and self._tree.has_entry(entry):
                self._tree.replace_version(entry, version)
        except OriginError as error:
            _log.warning("%s: %s", entry.path, error)
        except Exception:
            _log.exception("asking for %s failed in an unforeseen way", entry.path)
        finally:
            self._doubted_nodeids.discard(entry.nodeid)
            self._running_checks.pop(entry.nodeid, None)
            request.done.set()

    def _find_version(self, key: str) -> ObjectVersion | None:
        try:
            return self._tree.source.stat_object(key)
        except NotFoundError:
            return None
