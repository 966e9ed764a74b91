"""The listing of one source, kept fresh.

One LIST of a source is under way at most (a *flight*); it runs in a worker thread, and whoever needs a fresh listing
waits for it, for at most `PATIENCE` seconds since it began: in an outage one reader pays that, not every one. A failed
flight is not repeated before a pause. A listing is as old as the moment its LIST began.

Ownership: everything but `suspects` is written on the event loop only. Worker threads read `tree`, which is replaced,
never changed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, TypeVarTuple, Unpack

import trio

from fusecache.catalog.entry import CatalogSource, Entry
from fusecache.catalog.names import SkipReason
from fusecache.catalog.saved_listing import load_listing, save_listing
from fusecache.catalog.tree import Tree, build_tree, find_changed_names
from fusecache.errors import FusecacheError, NotFoundError, OriginError, UnavailableError
from fusecache.types import NodeId, ObjectVersion

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

LISTING_WAIT = 2.0
"""Seconds that a LOOKUP waits for a listing, after which it is answered from the one before."""
START_LISTING_WAIT = 15.0
"""Seconds that a mount waits for its first listing when there is a saved one to begin with."""
_MAX_PAUSE = 30.0
"""Longest pause, in seconds, between attempts to list a source that fails."""


class _SharedListing:
    """Something under way that several wait for."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.began_at = trio.current_time()
        self.error: FusecacheError | None = None

    async def wait_until_done(self, timeout: float = math.inf) -> bool:
        """Wait until it is done, but no longer than `patience` seconds after it began."""
        with trio.move_on_at(self.began_at + timeout):
            await self.done.wait()
        return self.done.is_set()


class Listing:
    """`tree` is what is known of `source`; `listed` whether it comes from a listing, saved or fresh.

    `taken` says which nodeids belong to other sources. `swapping(before, after)` is called on
    the event loop right before the tree is replaced, `swapped(changes)` right after.
    """

    def __init__(
        self,
        source: CatalogSource,
        *,
        ttl: float,
        directory: Path | None,
        clock: Callable[[], float],
        limiter: trio.CapacityLimiter,
        is_taken: Callable[[int], bool],
        before_swap: Callable[[Tree, Tree], None],
        after_swap: Callable[[list[tuple[NodeId, bytes]]], None],
        born_ns: int,
    ) -> None:
        self.source = source
        self.has_listing = False
        self.last_error: FusecacheError | None = None
        self.listed_at = -math.inf
        """By `clock`."""
        self.unconfirmed_nodeids: set[int] = set()
        """Nodeids whose version the origin no longer has, as a reader found out. Any thread adds to it."""
        self._ttl = ttl
        self._directory = directory
        self._clock = clock
        self._limiter = limiter
        self._is_taken = is_taken
        self._before_swap = before_swap
        self._after_swap = after_swap
        self._born_ns = born_ns
        self._shared_listing: _SharedListing | None = None
        self._running_checks: dict[int, _SharedListing] = {}
        self._failure_count = 0
        self._retry_at = -math.inf
        self._logged_reasons: set[SkipReason] = set()
        self._is_unsaved = False
        self.tree = build_tree(source.name, (), is_taken=is_taken, empty_mtime_ns=born_ns)

    # -- age

    @property
    def age(self) -> float:
        """Seconds since the listing that is served began; inf if it was never made by this process."""
        return self._clock() - self.listed_at

    def remaining_ttl(self, ttl: float) -> float:
        """Seconds for which the kernel may trust what it is told now. A stale listing is worth a second: in an
        outage the kernel need not ask for every access."""
        return max(min(1.0, ttl), ttl - self.age)

    # -- listing

    async def start(self) -> None:
        """Have a tree. Raises OriginError when the origin gives none and none is saved."""
        found = await self._run_in_thread(self._load_saved_tree)
        flight = self._start_listing()
        if found is None:
            await flight.wait_until_done()
            if flight.error is not None:
                raise flight.error
            return
        if await flight.wait_until_done(START_LISTING_WAIT) and flight.error is None:
            return
        error = flight.error
        if error is not None and not _is_outage(error):
            raise error
        if not self.has_listing:  # the flight did not come in between
            self._swap_tree(found)
            self.has_listing = True
            _log.warning(
                "%s can't be listed now (%s): serving the listing saved before",
                self.source.identity,
                error or "slow",
            )

    async def refresh(self) -> None:
        """List anew, beginning after this call. Raises OriginError; the tree is then the one before."""
        while (flight := self._shared_listing) is not None:
            await flight.wait_until_done()
        flight = self._start_listing()
        await flight.wait_until_done()
        if flight.error is not None:
            raise flight.error

    async def refresh_if_stale(self, ttl: float) -> None:
        """See to it that the listing is no older than `ttl` seconds, as far as that can be had within PATIENCE."""
        if self.age <= ttl and ttl > 0:
            return
        flight = self._shared_listing
        if flight is None:
            if self._clock() < self._retry_at:
                return
            flight = self._start_listing()
        await flight.wait_until_done(LISTING_WAIT)

    def _start_listing(self) -> _SharedListing:
        if self._shared_listing is None:
            self._shared_listing = _SharedListing()
            trio.lowlevel.spawn_system_task(
                self._run_listing, self._shared_listing, name=f"list {self.source.identity}"
            )
        return self._shared_listing

    async def _run_listing(self, flight: _SharedListing) -> None:
        # A task of its own: a caller that is cancelled, or runs out of patience, does not take the listing with it.
        began = self._clock()
        versions: Sequence[ObjectVersion] = ()
        try:
            before = self.tree
            after, versions, found = await self._run_in_thread(self._list_source, before)
            if self._swap_tree(after, found if self.tree is before else None) or not self.has_listing:
                self._is_unsaved = True
            self.has_listing, self.last_error, self.listed_at = True, None, began
            self._failure_count, self._retry_at = 0, -math.inf
            self._log_skipped_keys(after)
        except FusecacheError as error:
            flight.error = error
        except Exception as error:
            _log.exception("listing %s failed in an unforeseen way", self.source.identity)
            flight.error = UnavailableError(f"{self.source.identity} can't be listed: {type(error).__name__}")
        finally:
            if flight.error is not None:
                self._record_failure(flight.error)
            self._shared_listing = None
            flight.done.set()
        if self._is_unsaved and flight.error is None and self._directory is not None:
            self._is_unsaved = False
            await self._run_in_thread(self._save_versions, versions)

    def _record_failure(self, error: FusecacheError) -> None:
        self.last_error = error
        pause = min(_MAX_PAUSE, 2.0**self._failure_count)
        self._retry_at = self._clock() + pause
        self._failure_count += 1
        if self._failure_count == 1:
            _log.warning("listing %s failed: %s", self.source.identity, error)

    def _list_source(self, before: Tree) -> tuple[Tree, Sequence[ObjectVersion], list[tuple[NodeId, bytes]]]:
        versions = list(self.source.list_objects())
        after = build_tree(
            self.source.name, versions, before=before, is_taken=self._is_taken, empty_mtime_ns=self._born_ns
        )
        return after, versions, find_changed_names(before, after)

    def _swap_tree(self, after: Tree, found: list[tuple[NodeId, bytes]] | None = None) -> bool:
        before = self.tree
        if found is None:
            found = find_changed_names(before, after)
        self._before_swap(before, after)
        self.tree = after
        if found:
            self._after_swap(found)
        return bool(found)

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

    # -- the saved listing

    def _load_saved_tree(self) -> Tree | None:
        if self._directory is None:
            return None
        versions = load_listing(self._directory, self.source.identity)
        if versions is None:
            return None
        return build_tree(self.source.name, versions, is_taken=self._is_taken, empty_mtime_ns=self._born_ns)

    def _save_versions(self, versions: Sequence[ObjectVersion]) -> None:
        assert self._directory is not None
        try:
            save_listing(self._directory, self.source.identity, versions)
        except OSError as error:
            _log.warning("the listing of %s can't be saved: %s", self.source.identity, error.strerror)
        except Exception:
            _log.exception("saving the listing of %s failed in an unforeseen way", self.source.identity)

    # -- single objects

    def start_object_check(self, entry: Entry) -> None:
        """The origin no longer has this version: ask it about this object. On the event loop only."""
        if self.tree.entries_by_id.get(entry.nodeid) is not entry:
            self.unconfirmed_nodeids.discard(entry.nodeid)
        elif entry.nodeid not in self._running_checks:
            self._running_checks[entry.nodeid] = flight = _SharedListing()
            trio.lowlevel.spawn_system_task(self._check_object, entry, flight, name=f"stat {entry.path}")

    async def wait_object_check(self, entry: Entry) -> None:
        """If the version of this entry is in doubt, wait for the origin's answer, for at most PATIENCE."""
        if entry.nodeid in self.unconfirmed_nodeids:
            self.start_object_check(entry)
            flight = self._running_checks.get(entry.nodeid)
            if flight is not None:
                await flight.wait_until_done(LISTING_WAIT)

    async def _check_object(self, entry: Entry, flight: _SharedListing) -> None:
        assert entry.version is not None
        key = entry.version.key
        try:
            version: ObjectVersion | None
            try:
                version = await self._run_in_thread(self.source.stat_object, key)
            except NotFoundError:
                version = None
            if version != entry.version and self.tree.entries_by_id.get(entry.nodeid) is entry:
                self._is_unsaved = True
                self._swap_tree(
                    self.tree.replace_version(entry, version, self._is_taken), [(entry.parent, entry.name)]
                )  # cheap enough for the loop: 5 ms at 100,000 objects
        except OriginError as error:
            _log.warning("%s: %s", entry.path, error)
        except Exception:
            _log.exception("asking for %s failed in an unforeseen way", entry.path)
        finally:
            self.unconfirmed_nodeids.discard(entry.nodeid)
            self._running_checks.pop(entry.nodeid, None)
            flight.done.set()

    async def _run_in_thread(self, work: Callable[[Unpack[_Ts]], _T], *arguments: *_Ts) -> _T:
        return await trio.to_thread.run_sync(work, *arguments, abandon_on_cancel=True, limiter=self._limiter)


def _is_outage(error: FusecacheError) -> bool:
    """Whether this says that the origin is out of reach, and not that the user named the wrong one."""
    return isinstance(error, UnavailableError) or (isinstance(error, OriginError) and error.is_temporary)
