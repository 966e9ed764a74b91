"""The listing of one source, kept fresh.

At most one LIST of a source is under way; it runs in a worker thread, and every task that needs a fresh listing waits
for it, for at most LISTING_WAIT seconds since it began: in an outage one reader pays that, not every one. A LIST that
failed is not repeated before a pause. A listing is as old as the moment its LIST began.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, TypeVarTuple, Unpack

import trio

from fusecache.catalog.entry import CatalogSource, Entry
from fusecache.catalog.index import EntryIndex
from fusecache.catalog.names import SkipReason
from fusecache.catalog.retained import RetainedNodes
from fusecache.catalog.saved_listing import load_listing, save_listing
from fusecache.catalog.tree import Tree, build_tree, find_changed_names
from fusecache.errors import FusecacheError, NotFoundError, OriginError, UnavailableError
from fusecache.events import ChangedNames, Event
from fusecache.types import ObjectVersion

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

LISTING_WAIT = 2.0
"""Seconds that a LOOKUP waits for a listing, after which it is answered from the one before."""
START_LISTING_WAIT = 15.0
"""Seconds that a mount waits for its first listing when there is a saved one to begin with."""
_MAX_PAUSE = 30.0
"""Longest pause, in seconds, between attempts to list a source that fails."""


class _SharedRequest:
    """A request to the origin that is under way, and that several tasks wait for."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.began_at = trio.current_time()
        self.error: FusecacheError | None = None

    async def wait_until_done(self, timeout: float = math.inf) -> bool:
        """Wait until the answer is there, but no longer than `timeout` seconds after the request began; returns whether
        it is there."""
        with trio.move_on_at(self.began_at + timeout):
            await self.done.wait()
        return self.done.is_set()


class Listing:
    """Keeps the tree of `source` in `index` fresh.

    Belongs to the event loop: every attribute is written there, but for the set of doubted nodeids, to which any thread
    adds. The work in worker threads (LIST, building a tree, the file of the saved listing) gets what it needs as
    arguments.

    | What happens | The listing |
    |---|---|
    | in the beginning | is empty; `has_listing` is false |
    | a LIST is answered | is served, with the age of the LIST's beginning, and saved if it differs from the one before
    |
    | the first LIST fails in an outage, or takes 15 s, and there is a saved listing | is the saved one, infinitely old
    |
    | a later LIST fails | stays, and `last_error` says why; the next attempt comes after a pause of 1 s to 30 s |
    | a version is doubted | stays, and the origin is asked for that object alone |
    | the answer is another version, or none | is served with that change |
    """

    def __init__(
        self,
        source: CatalogSource,
        index: EntryIndex,
        retained: RetainedNodes,
        *,
        names_changed: Event[[ChangedNames]],
        directory: Path | None,
        clock: Callable[[], float],
        limiter: trio.CapacityLimiter,
    ) -> None:
        """`directory` is where the listing is saved, None: nowhere. `clock` gives seconds."""
        self.source = source
        self.has_listing = False
        self.last_error: FusecacheError | None = None
        self.listed_at = -math.inf
        """By `clock`."""
        self._doubted_nodeids: set[int] = set()
        """Nodeids whose version the origin no longer has, as a reader found out."""
        self._index = index
        self._retained = retained
        self._names_changed = names_changed
        self._directory = directory
        self._clock = clock
        self._limiter = limiter
        self._is_taken = functools.partial(index.is_taken_elsewhere, source.name)
        self._running_list: _SharedRequest | None = None
        self._running_checks: dict[int, _SharedRequest] = {}
        self._failure_count = 0
        self._retry_at = -math.inf
        self._logged_reasons: set[SkipReason] = set()
        self._is_unsaved = False

    @property
    def tree(self) -> Tree:
        """The tree that is served now."""
        return self._index.tree_of(self.source.name)

    # -- age

    @property
    def age(self) -> float:
        """Seconds since the listing that is served began; inf if this process never made one."""
        return self._clock() - self.listed_at

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
        if not self.has_listing:  # the LIST was not answered in between
            self._swap_tree(found)
            self.has_listing = True
            _log.warning(
                "%s can't be listed now (%s): serving the listing saved before",
                self.source.identity,
                error or "slow",
            )

    async def refresh(self) -> None:
        """Make a LIST that begins after this call, and wait for it. Raises OriginError; the tree is then the one
        before."""
        while (flight := self._running_list) is not None:
            await flight.wait_until_done()
        flight = self._start_listing()
        await flight.wait_until_done()
        if flight.error is not None:
            raise flight.error

    async def refresh_if_stale(self, ttl: float) -> None:
        """Have the listing no older than `ttl` seconds: join or begin a LIST, and wait for it until LISTING_WAIT
        seconds after it began. Afterwards the listing may be the one before."""
        if self.age <= ttl and ttl > 0:
            return
        flight = self._running_list
        if flight is None:
            if self._clock() < self._retry_at:
                return
            flight = self._start_listing()
        await flight.wait_until_done(LISTING_WAIT)

    def _start_listing(self) -> _SharedRequest:
        if self._running_list is None:
            self._running_list = _SharedRequest()
            trio.lowlevel.spawn_system_task(
                self._run_listing, self._running_list, name=f"list {self.source.identity}"
            )
        return self._running_list

    async def _run_listing(self, flight: _SharedRequest) -> None:
        # A task of its own: a caller that is cancelled, or stops waiting, does not take the LIST with it.
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
            self._running_list = None
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

    def _list_source(self, before: Tree) -> tuple[Tree, Sequence[ObjectVersion], ChangedNames]:
        versions = list(self.source.list_objects())
        after = self._build_tree(versions, before)
        return after, versions, find_changed_names(before, after)

    def _build_tree(self, versions: Sequence[ObjectVersion], before: Tree | None = None) -> Tree:
        return build_tree(
            self.source.name,
            versions,
            before=before,
            is_taken=self._is_taken,
            empty_mtime_ns=self._index.born_ns,
        )

    def _swap_tree(self, after: Tree, changes: ChangedNames | None = None) -> bool:
        """Serve `after` and publish what changed, which `changes` names if it is known; returns whether anything
        did."""
        before = self.tree
        if changes is None:
            changes = find_changed_names(before, after)
        self._retained.detach_missing(before, after)
        self._index.replace_tree(self.source.name, after)
        if changes:
            self._retained.drop_reattached()
            self._names_changed.publish(changes)
        return bool(changes)

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
        return self._build_tree(versions)

    def _save_versions(self, versions: Sequence[ObjectVersion]) -> None:
        assert self._directory is not None
        try:
            save_listing(self._directory, self.source.identity, versions)
        except OSError as error:
            _log.warning("the listing of %s can't be saved: %s", self.source.identity, error.strerror)
        except Exception:
            _log.exception("saving the listing of %s failed in an unforeseen way", self.source.identity)

    # -- single objects

    def doubt_version(self, entry: Entry) -> bool:
        """Note that the origin no longer has the version of this entry; returns whether the entry is in the tree still.
        Thread-safe; `start_object_check` has to follow on the event loop."""
        if entry.version is None or self.tree.entries_by_id.get(entry.nodeid) is not entry:
            return False
        self._doubted_nodeids.add(entry.nodeid)
        return True

    def is_in_doubt(self, entry: Entry) -> bool:
        """Whether the version of this entry is doubted, and the origin has not answered yet."""
        return entry.nodeid in self._doubted_nodeids

    def start_object_check(self, entry: Entry) -> None:
        """Ask the origin for the object of this entry, whose version is doubted, unless that is under way."""
        if self.tree.entries_by_id.get(entry.nodeid) is not entry:
            self._doubted_nodeids.discard(entry.nodeid)
        elif entry.nodeid not in self._running_checks:
            self._running_checks[entry.nodeid] = flight = _SharedRequest()
            trio.lowlevel.spawn_system_task(self._check_object, entry, flight, name=f"stat {entry.path}")

    async def wait_object_check(self, entry: Entry) -> None:
        """If the version of this entry is doubted, wait for the origin's answer until LISTING_WAIT seconds after the
        request began."""
        if self.is_in_doubt(entry):
            self.start_object_check(entry)
            flight = self._running_checks.get(entry.nodeid)
            if flight is not None:
                await flight.wait_until_done(LISTING_WAIT)

    async def _check_object(self, entry: Entry, flight: _SharedRequest) -> None:
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
            self._doubted_nodeids.discard(entry.nodeid)
            self._running_checks.pop(entry.nodeid, None)
            flight.done.set()

    async def _run_in_thread(self, work: Callable[[Unpack[_Ts]], _T], *arguments: *_Ts) -> _T:
        return await trio.to_thread.run_sync(work, *arguments, abandon_on_cancel=True, limiter=self._limiter)


def _is_outage(error: FusecacheError) -> bool:
    """Whether the origin is out of reach, and not the wrong one."""
    return isinstance(error, UnavailableError) or (isinstance(error, OriginError) and error.is_temporary)
