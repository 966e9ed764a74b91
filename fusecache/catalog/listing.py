"""The listing of one source, kept fresh.

At most one LIST of a source is under way; it runs in a worker thread, and every task that needs a fresh listing waits
for it, for at most REQUEST_WAIT seconds since it began: in an outage one reader pays that, not every one. A LIST that
failed is not repeated before a pause. A listing is as old as the moment its LIST began.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, TypeVarTuple, Unpack

import trio

from fusecache.catalog.names import SkipReason
from fusecache.catalog.saved_listing import load_listing, save_listing
from fusecache.catalog.shared_request import REQUEST_WAIT, SharedRequest
from fusecache.catalog.source_tree import SourceTree
from fusecache.catalog.tree import Tree, find_changed_names
from fusecache.errors import FusecacheError, OriginError, UnavailableError
from fusecache.events import ChangedNames
from fusecache.types import ObjectVersion

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

START_LISTING_WAIT = 15.0
"""Seconds that a mount waits for its first listing when there is a saved one to begin with."""
_MAX_PAUSE = 30.0
"""Longest pause, in seconds, between attempts to list a source that fails."""


class Listing:
    """Keeps the tree of one source fresh. Belongs to the event loop; the work in worker threads (LIST, building a tree,
    the file of the saved listing) gets what it needs as arguments.

    | What happens | The listing |
    |---|---|
    | in the beginning | is empty; `has_listing` is false |
    | a LIST is answered | is served, as old as the LIST's beginning, and saved if it differs from the one before |
    | the first LIST fails in an outage, or takes 15 s, and there is a saved one | is the saved one, infinitely old |
    | a later LIST fails | stays, and `last_error` says why; the next attempt comes after a pause of 1 s to 30 s |
    """

    def __init__(
        self,
        tree: SourceTree,
        *,
        directory: Path | None,
        clock: Callable[[], float],
        limiter: trio.CapacityLimiter,
    ) -> None:
        """`directory` is where the listing is saved, None: nowhere. `clock` gives seconds."""
        self.source = tree.source
        self.has_listing = False
        self.last_error: FusecacheError | None = None
        self._tree = tree
        self._directory = directory
        self._clock = clock
        self._limiter = limiter
        self._listed_at = -math.inf
        """By `clock`."""
        self._running_list: SharedRequest | None = None
        self._failure_count = 0
        self._retry_at = -math.inf
        self._logged_reasons: set[SkipReason] = set()
        self._is_known_empty = False
        """Whether the last LIST that was answered found no object, which the log says."""

    # -- age

    @property
    def age(self) -> float:
        """Seconds since the listing that is served began; inf if this process never made one."""
        return self._clock() - self._listed_at

    def raise_if_never_listed(self) -> None:
        """Raise the error of the last attempt if there never was a listing, saved or fresh."""
        if not self.has_listing and self.last_error is not None:
            raise self.last_error

    def remaining_ttl(self, ttl: float) -> float:
        """Seconds for which the kernel may trust what it is told now. A stale listing is worth a second: in an
        outage the kernel need not ask for every access."""
        return max(min(1.0, ttl), ttl - self.age)

    # -- listing

    async def start(self) -> None:
        """Have a first listing. Raises OriginError when the origin gives none and none is saved. May wait for the
        origin; with a saved listing for at most START_LISTING_WAIT seconds."""
        found = await self._run_in_thread(self._load_saved_tree)
        request = self._start_listing()
        if found is None:
            await request.wait_until_done()
            if request.error is not None:
                raise request.error
            return
        if await request.wait_until_done(START_LISTING_WAIT) and request.error is None:
            return
        error = request.error
        if error is not None and not _is_outage(error):
            raise error
        if not self.has_listing:  # the LIST was not answered in between
            self._tree.replace(found)
            self.has_listing = True
            _log.warning(
                "%s can't be listed now (%s): serving the listing saved before",
                self.source.identity,
                error or "slow",
            )

    async def refresh(self) -> None:
        """Make a LIST that begins after this call, and wait for it. Raises OriginError; the tree is then the one
        before."""
        while (request := self._running_list) is not None:
            await request.wait_until_done()
        request = self._start_listing()
        await request.wait_until_done()
        if request.error is not None:
            raise request.error

    async def refresh_if_stale(self, ttl: float) -> None:
        """Have the listing no older than `ttl` seconds: join or begin a LIST, and wait for it until REQUEST_WAIT
        seconds after it began. Afterwards the listing may be the one before."""
        if self.age <= ttl and ttl > 0:
            return
        request = self._running_list
        if request is None:
            if self._clock() < self._retry_at:
                return
            request = self._start_listing()
        await request.wait_until_done(REQUEST_WAIT)

    def _start_listing(self) -> SharedRequest:
        if self._running_list is None:
            self._running_list = SharedRequest()
            trio.lowlevel.spawn_system_task(
                self._run_listing, self._running_list, name=f"list {self.source.identity}"
            )
        return self._running_list

    async def _run_listing(self, request: SharedRequest) -> None:
        # A task of its own: a caller that is cancelled, or stops waiting, does not take the LIST with it.
        began = self._clock()
        versions: Sequence[ObjectVersion] = ()
        try:
            before = self._tree.current
            after, versions, found = await self._run_in_thread(self._list_source, before)
            if (
                self._tree.replace(after, found if self._tree.current is before else None)
                or not self.has_listing
            ):
                self._tree.mark_unsaved()
            self.has_listing, self.last_error, self._listed_at = True, None, began
            self._failure_count, self._retry_at = 0, -math.inf
            self._log_skipped_keys(after)
            self._log_if_empty(not versions)
        except FusecacheError as error:
            request.error = error
        except Exception as error:
            _log.exception("listing %s failed in an unforeseen way", self.source.identity)
            request.error = UnavailableError(
                f"{self.source.identity} can't be listed: {type(error).__name__}"
            )
        finally:
            if request.error is not None:
                self._record_failure(request.error)
            self._running_list = None
            request.done.set()
        if request.error is None and self._directory is not None and self._tree.take_unsaved():
            await self._run_in_thread(self._save_versions, versions)

    def _record_failure(self, error: FusecacheError) -> None:
        self.last_error = error
        pause = min(_MAX_PAUSE, 2.0**self._failure_count)
        self._retry_at = self._clock() + pause
        self._failure_count += 1
        if self._failure_count == 1:
            _log.warning("listing %s failed: %s", self.source.identity, error)

    def _list_source(self, before: Tree) -> tuple[Tree, Sequence[ObjectVersion], ChangedNames]:
        versions = list(self.source.list_objects())
        after = self._tree.build(versions, before)
        return after, versions, find_changed_names(before, after)

    def _log_skipped_keys(self, tree: Tree) -> None:
        for reason, (count, example) in tree.skipped.items():
            if reason not in self._logged_reasons:
                self._logged_reasons.add(reason)
                _log.warning(
                    "%s: %d keys with %s, like %r (see SEMANTICS.md)",
                    self.source.identity,
                    count,
                    reason.value,
                    example,
                )

    def _log_if_empty(self, is_empty: bool) -> None:
        """Warn when a LIST finds nothing, after one that found something or as the first."""
        if is_empty and not self._is_known_empty:
            _log.warning(
                "%s: no object is there, its directory is empty: check the bucket and the prefix, which is a folder "
                "and not one object",
                self.source.identity,
            )
        self._is_known_empty = is_empty

    # -- the saved listing

    def _load_saved_tree(self) -> Tree | None:
        if self._directory is None:
            return None
        versions = load_listing(self._directory, self.source.identity)
        if versions is None:
            return None
        return self._tree.build(versions)

    def _save_versions(self, versions: Sequence[ObjectVersion]) -> None:
        assert self._directory is not None
        try:
            save_listing(self._directory, self.source.identity, versions)
        except OSError as error:
            _log.warning("the listing of %s can't be saved: %s", self.source.identity, error.strerror)
        except Exception:
            _log.exception("saving the listing of %s failed in an unforeseen way", self.source.identity)

    async def _run_in_thread(self, work: Callable[[Unpack[_Ts]], _T], *arguments: *_Ts) -> _T:
        return await trio.to_thread.run_sync(work, *arguments, abandon_on_cancel=True, limiter=self._limiter)


def _is_outage(error: FusecacheError) -> bool:
    """Whether the origin is out of reach, and not the wrong one."""
    return isinstance(error, UnavailableError) or (isinstance(error, OriginError) and error.is_temporary)
