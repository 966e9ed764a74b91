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

from fusecache.catalog import saved
from fusecache.catalog.entry import CatalogSource, Entry
from fusecache.catalog.keys import Skip
from fusecache.catalog.tree import Tree, build, changes
from fusecache.errors import FusecacheError, NotFoundError, OriginError, UnavailableError
from fusecache.types import NodeId, ObjectVersion

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

PATIENCE = 2.0
"""Seconds that a LOOKUP waits for a listing, after which it is answered from the one before."""
START_PATIENCE = 15.0
"""Seconds that a mount waits for its first listing when there is a saved one to begin with."""
_PAUSE_MAX = 30.0
"""Longest pause, in seconds, between attempts to list a source that fails."""


class _Flight:
    """Something under way that several wait for."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.began = trio.current_time()
        self.error: FusecacheError | None = None

    async def wait(self, patience: float = math.inf) -> bool:
        """Wait until it is done, but no longer than `patience` seconds after it began."""
        with trio.move_on_at(self.began + patience):
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
        taken: Callable[[int], bool],
        swapping: Callable[[Tree, Tree], None],
        swapped: Callable[[list[tuple[NodeId, bytes]]], None],
        born_ns: int,
    ) -> None:
        self.source = source
        self.listed = False
        self.error: FusecacheError | None = None
        self.listed_at = -math.inf
        """By `clock`."""
        self.suspects: set[int] = set()
        """Nodeids whose version the origin no longer has, as a reader found out. Any thread adds to it."""
        self._ttl = ttl
        self._directory = directory
        self._clock = clock
        self._limiter = limiter
        self._taken = taken
        self._swapping = swapping
        self._swapped = swapped
        self._born_ns = born_ns
        self._flight: _Flight | None = None
        self._checks: dict[int, _Flight] = {}
        self._failures = 0
        self._retry_at = -math.inf
        self._told: set[Skip] = set()
        self._unsaved = False
        self.tree = build(source.name, (), taken=taken, empty_mtime_ns=born_ns)

    # -- age

    @property
    def age(self) -> float:
        """Seconds since the listing that is served began; inf if it was never made by this process."""
        return self._clock() - self.listed_at

    def remaining(self, ttl: float) -> float:
        """Seconds for which the kernel may trust what it is told now. A stale listing is worth a second: in an
        outage the kernel need not ask for every access."""
        return max(min(1.0, ttl), ttl - self.age)

    # -- listing

    async def start(self) -> None:
        """Have a tree. Raises OriginError when the origin gives none and none is saved."""
        found = await self._in_thread(self._load_saved)
        flight = self._begin()
        if found is None:
            await flight.wait()
            if flight.error is not None:
                raise flight.error
            return
        if await flight.wait(START_PATIENCE) and flight.error is None:
            return
        error = flight.error
        if error is not None and not _outage(error):
            raise error
        if not self.listed:  # the flight did not come in between
            self._swap(found)
            self.listed = True
            _log.warning(
                "%s can't be listed now (%s): serving the listing saved before",
                self.source.identity,
                error or "slow",
            )

    async def refresh(self) -> None:
        """List anew, beginning after this call. Raises OriginError; the tree is then the one before."""
        while (flight := self._flight) is not None:
            await flight.wait()
        flight = self._begin()
        await flight.wait()
        if flight.error is not None:
            raise flight.error

    async def fresh(self, ttl: float) -> None:
        """See to it that the listing is no older than `ttl` seconds, as far as that can be had within PATIENCE."""
        if self.age <= ttl and ttl > 0:
            return
        flight = self._flight
        if flight is None:
            if self._clock() < self._retry_at:
                return
            flight = self._begin()
        await flight.wait(PATIENCE)

    def _begin(self) -> _Flight:
        if self._flight is None:
            self._flight = _Flight()
            trio.lowlevel.spawn_system_task(self._fly, self._flight, name=f"list {self.source.identity}")
        return self._flight

    async def _fly(self, flight: _Flight) -> None:
        # A task of its own: a caller that is cancelled, or runs out of patience, does not take the listing with it.
        began = self._clock()
        versions: Sequence[ObjectVersion] = ()
        try:
            before = self.tree
            after, versions, found = await self._in_thread(self._list, before)
            if self._swap(after, found if self.tree is before else None) or not self.listed:
                self._unsaved = True
            self.listed, self.error, self.listed_at = True, None, began
            self._failures, self._retry_at = 0, -math.inf
            self._tell(after)
        except FusecacheError as error:
            flight.error = error
        except Exception as error:
            _log.exception("listing %s failed in an unforeseen way", self.source.identity)
            flight.error = UnavailableError(f"{self.source.identity} can't be listed: {type(error).__name__}")
        finally:
            if flight.error is not None:
                self._failed(flight.error)
            self._flight = None
            flight.done.set()
        if self._unsaved and flight.error is None and self._directory is not None:
            self._unsaved = False
            await self._in_thread(self._save, versions)

    def _failed(self, error: FusecacheError) -> None:
        self.error = error
        pause = min(_PAUSE_MAX, 2.0**self._failures)
        self._retry_at = self._clock() + pause
        self._failures += 1
        if self._failures == 1:
            _log.warning("listing %s failed: %s", self.source.identity, error)

    def _list(self, before: Tree) -> tuple[Tree, Sequence[ObjectVersion], list[tuple[NodeId, bytes]]]:
        versions = list(self.source.list())
        after = build(
            self.source.name, versions, before=before, taken=self._taken, empty_mtime_ns=self._born_ns
        )
        return after, versions, changes(before, after)

    def _swap(self, after: Tree, found: list[tuple[NodeId, bytes]] | None = None) -> bool:
        before = self.tree
        if found is None:
            found = changes(before, after)
        self._swapping(before, after)
        self.tree = after
        if found:
            self._swapped(found)
        return bool(found)

    def _tell(self, tree: Tree) -> None:
        for reason, (count, example) in tree.skipped.items():
            if reason not in self._told:
                self._told.add(reason)
                _log.warning(
                    "%s: %d keys with %s, like %r (see SEMANTICS.md)",
                    self.source.identity, count, reason.value, example,
                )  # fmt: skip

    # -- the saved listing

    def _load_saved(self) -> Tree | None:
        if self._directory is None:
            return None
        versions = saved.load(self._directory, self.source.identity)
        if versions is None:
            return None
        return build(self.source.name, versions, taken=self._taken, empty_mtime_ns=self._born_ns)

    def _save(self, versions: Sequence[ObjectVersion]) -> None:
        assert self._directory is not None
        try:
            saved.save(self._directory, self.source.identity, versions)
        except OSError as error:
            _log.warning("the listing of %s can't be saved: %s", self.source.identity, error.strerror)
        except Exception:
            _log.exception("saving the listing of %s failed in an unforeseen way", self.source.identity)

    # -- single objects

    def suspect(self, entry: Entry) -> None:
        """The origin no longer has this version: ask it about this object. On the event loop only."""
        if self.tree.by_id.get(entry.nodeid) is not entry:
            self.suspects.discard(entry.nodeid)
        elif entry.nodeid not in self._checks:
            self._checks[entry.nodeid] = flight = _Flight()
            trio.lowlevel.spawn_system_task(self._check, entry, flight, name=f"stat {entry.path}")

    async def settle(self, entry: Entry) -> None:
        """If the version of this entry is in doubt, wait for the origin's answer, for at most PATIENCE."""
        if entry.nodeid in self.suspects:
            self.suspect(entry)
            flight = self._checks.get(entry.nodeid)
            if flight is not None:
                await flight.wait(PATIENCE)

    async def _check(self, entry: Entry, flight: _Flight) -> None:
        assert entry.version is not None
        key = entry.version.key
        try:
            version: ObjectVersion | None
            try:
                version = await self._in_thread(self.source.stat, key)
            except NotFoundError:
                version = None
            if version != entry.version and self.tree.by_id.get(entry.nodeid) is entry:
                self._unsaved = True
                self._swap(
                    self.tree.replace(entry, version, self._taken), [(entry.parent, entry.name)]
                )  # cheap enough for the loop: 5 ms at 100,000 objects
        except OriginError as error:
            _log.warning("%s: %s", entry.path, error)
        except Exception:
            _log.exception("asking for %s failed in an unforeseen way", entry.path)
        finally:
            self.suspects.discard(entry.nodeid)
            self._checks.pop(entry.nodeid, None)
            flight.done.set()

    async def _in_thread(self, work: Callable[[Unpack[_Ts]], _T], *arguments: *_Ts) -> _T:
        return await trio.to_thread.run_sync(work, *arguments, abandon_on_cancel=True, limiter=self._limiter)


def _outage(error: FusecacheError) -> bool:
    """Whether this says that the origin is out of reach, and not that the user named the wrong one."""
    return isinstance(error, UnavailableError) or (isinstance(error, OriginError) and error.temporary)
