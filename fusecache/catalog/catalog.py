"""The tree of a mount: one source at the root, or several as directories below it.

All names and attributes are answered from memory. What may wait for the origin is `async` (`resolve`, `settle`,
`fresh`, `refresh`, `start`); everything else is one look into immutable trees and may be called from any thread, except
`retain` and `release`, which belong to the event loop.

A nodeid that the kernel knows, or a handle has open, goes on to be resolvable after its object changed: `retain`
counts, and an entry that a refresh takes out of the tree is kept while its count is not zero. The order of writes in
`_keep` makes that seamless for other threads: the old entry is in `_old` before it is out of the tree, and `get` looks
into the trees first.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import trio

from fusecache.catalog.entry import ROOT, CatalogSource, Entry
from fusecache.catalog.listing import Listing
from fusecache.catalog.tree import FIRST_CURSOR, Tree
from fusecache.errors import ConfigError, FusecacheError
from fusecache.types import NodeId

_log = logging.getLogger(__name__)

Changes = list[tuple[NodeId, bytes]]
"""(directory, name) pairs that the kernel should look up again."""


class Catalog:
    """The tree over `sources`. `ttl` is how many seconds a listing is trusted for names that are in it,
    `negative_ttl` (the same unless given) for names that are not. Listings are saved below `snapshot_dir`.

    `on_change` is called on the event loop after a change. Raises ConfigError for sources that can't share a root.
    """

    def __init__(
        self,
        sources: Sequence[CatalogSource],
        *,
        ttl: float,
        snapshot_dir: Path | None,
        negative_ttl: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        names = [source.name for source in sources]
        if not sources or len(set(names)) != len(names) or ("" in names and len(names) > 1):
            raise ConfigError("several sources under one mount need a name each, all different")
        self.generation = 0
        """Grows with every change of the tree."""
        self.on_change: Callable[[Changes], None] = _nothing
        self._ttl = ttl
        self._negative_ttl = ttl if negative_ttl is None else negative_ttl
        self._counts: dict[int, int] = {}
        """nodeid -> lookups the kernel has not forgotten, and open handles."""
        self._old: dict[int, Entry] = {}
        """Entries that are in no tree any more and retained."""
        self._token: trio.lowlevel.TrioToken | None = None
        self._listings: dict[str, Listing] = {}
        born_ns = time.time_ns()
        limiter = trio.CapacityLimiter(len(sources) + 8)
        for source in sources:
            self._listings[source.name] = Listing(
                source,
                ttl=ttl,
                directory=snapshot_dir,
                clock=clock,
                limiter=limiter,
                taken=self._taken_by_others(source.name),
                swapping=self._keep,
                swapped=self._announce,
                born_ns=born_ns,
            )
        self._top: Entry | None = None
        if "" not in self._listings:
            self._top = Entry(ROOT, ROOT, b"", "", True, None, "", 0, born_ns)

    # -- life

    async def start(self) -> None:
        """Make the first listing of every source. A source that fails is an entry that can't be opened until a later
        attempt lists it; raises the OriginError when all of them fail."""
        self._token = trio.lowlevel.current_trio_token()
        errors: list[FusecacheError] = []

        async def one(listing: Listing) -> None:
            try:
                await listing.start()
            except FusecacheError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for listing in self._listings.values():
                nursery.start_soon(one, listing)
        if len(errors) == len(self._listings):
            raise errors[0]

    async def refresh(self) -> None:
        """List all sources anew. Raises the first OriginError; what could be listed is."""
        errors: list[FusecacheError] = []

        async def one(listing: Listing) -> None:
            try:
                await listing.refresh()
            except FusecacheError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for listing in self._listings.values():
                nursery.start_soon(one, listing)
        if errors:
            raise errors[0]

    async def fresh(self, entry: Entry | None = None) -> None:
        """Join or begin a refresh where the listing (of this entry's source) is older than the ttl; wait at most
        2 s since it began, then go on with what there is."""
        for listing in self._concerned(entry):
            await listing.fresh(self._ttl)

    def changed(self, entry: Entry) -> None:
        """The origin no longer has this entry's version, as a reader found out. Thread-safe; does not block. The
        object is asked for again at once, and a LOOKUP of it waits for the answer."""
        listing = self._listings.get(entry.source)
        if listing is None or entry.version is None or listing.tree.by_id.get(entry.nodeid) is not entry:
            return
        listing.suspects.add(entry.nodeid)
        if self._token is not None:
            self._token.run_sync_soon(listing.suspect, entry, idempotent=True)

    # -- names

    async def resolve(self, parent: int, name: bytes) -> Entry | None:
        """What LOOKUP answers: the child as of a fresh listing, or None. Raises OriginError below a source that
        could never be listed: nothing is known then, also not that the name does not exist."""
        entry = self.lookup(parent, name)
        above = self.get(parent) if entry is None else entry
        if above is None:
            return None
        listing = self._listings.get(above.source)
        if listing is None or (self._top is not None and parent == ROOT):
            return entry
        ttl = self._negative_ttl if entry is None else self._ttl
        if entry is not None and entry.nodeid in listing.suspects:
            await listing.settle(entry)
        else:
            await listing.fresh(ttl)
        if not listing.listed and listing.error is not None:
            raise listing.error
        return self.lookup(parent, name)

    def lookup(self, parent: int, name: bytes) -> Entry | None:
        """The child of a directory, from memory."""
        if self._top is not None and parent == ROOT:
            return next((entry for entry in self.children(ROOT) if entry.name == name), None)
        for listing in self._listings.values():
            if (entry := listing.tree.lookup(parent, name)) is not None:
                return entry
        return None

    def get(self, nodeid: int) -> Entry | None:
        """The entry behind a nodeid, also one that is retained only."""
        if nodeid == ROOT and self._top is not None:
            return self._top
        return self._current(nodeid) or self._old.get(nodeid)

    def is_current(self, nodeid: int) -> bool:
        """Whether this nodeid is in the tree, and not only retained."""
        return (nodeid == ROOT and self._top is not None) or self._current(nodeid) is not None

    def _current(self, nodeid: int) -> Entry | None:
        for listing in self._listings.values():
            if (entry := listing.tree.by_id.get(nodeid)) is not None:
                return entry
        return None

    def find(self, path: str) -> Entry | None:
        """The entry at a path relative to the mountpoint ('' is the root)."""
        entry = self.get(ROOT)
        for part in path.split("/") if path else ():
            if entry is None:
                return None
            try:
                entry = self.lookup(entry.nodeid, part.encode("utf-8", "surrogateescape"))
            except UnicodeEncodeError:
                return None
        return entry

    # -- directories

    def children(self, nodeid: int) -> Sequence[Entry]:
        """What is in a directory, sorted by name."""
        if self._top is not None and nodeid == ROOT:
            return sorted(
                (listing.tree.root for listing in self._listings.values()), key=lambda each: each.name
            )
        for listing in self._listings.values():
            if (found := listing.tree.below.get(nodeid)) is not None:
                return found
        return ()

    def scan(self, nodeid: int, cursor: int) -> Iterator[tuple[int, Entry]]:
        """The children of a directory behind a directory offset, each with its own offset (>= 3).

        Offsets are hashes of names: a scan that goes on after a refresh, or after a restart, meets each name that was
        there all the time exactly once.
        """
        if self._top is not None and nodeid == ROOT:
            for at, entry in enumerate(
                self.children(ROOT), FIRST_CURSOR
            ):  # sources don't change during a mount
                if at > cursor:
                    yield at, entry
            return
        for listing in self._listings.values():
            if nodeid in listing.tree.below:
                yield from listing.tree.scan(nodeid, cursor)
                return

    async def open_directory(self, entry: Entry) -> None:
        """Before a directory is read: have a fresh listing. Raises OriginError where there never was one."""
        listing = self._listings.get(entry.source)
        if listing is None or entry is self._top:
            return
        await listing.fresh(self._ttl)
        if not listing.listed and listing.error is not None:
            raise listing.error

    def walk(self) -> Iterator[Entry]:
        """All entries below the root, depth first."""
        for name in sorted(self._listings):
            tree = self._listings[name].tree
            if self._top is not None:
                yield tree.root
            yield from tree.walk()

    def siblings(self, entry: Entry) -> Sequence[Entry]:
        """The entries of the directory that this one is in, itself included, sorted by name."""
        return self.children(entry.parent)

    # -- how long the kernel may trust it

    def lifetime(self, entry: Entry) -> float:
        """Seconds for which what is known of this entry may be trusted."""
        return min((each.remaining(self._ttl) for each in self._concerned(entry)), default=self._ttl)

    def negative_lifetime(self, parent: int) -> float:
        """Seconds for which a name may be trusted not to be in this directory."""
        listings = self._concerned(self.get(parent))
        return min((each.remaining(self._negative_ttl) for each in listings), default=self._negative_ttl)

    @property
    def age(self) -> float:
        """Seconds since the oldest listing that is served; of a source that was never listed: since ever (-1)."""
        oldest = max(listing.age for listing in self._listings.values())
        return oldest if math.isfinite(oldest) else -1.0

    @property
    def totals(self) -> tuple[int, int]:
        """Files, and their bytes."""
        trees = [listing.tree for listing in self._listings.values()]
        return sum(tree.files for tree in trees), sum(tree.size for tree in trees)

    def identity(self, entry: Entry) -> str:
        """The canonical identity of the origin behind an entry; '' for a root that several sources share."""
        listing = self._listings.get(entry.source)
        return "" if listing is None or entry is self._top else listing.source.identity

    @property
    def errors(self) -> dict[str, str]:
        """Source -> why its last listing failed."""
        return {name: str(each.error) for name, each in self._listings.items() if each.error is not None}

    def _concerned(self, entry: Entry | None) -> list[Listing]:
        if entry is None:
            return list(self._listings.values())
        listing = self._listings.get(entry.source)
        return [] if listing is None or entry is self._top else [listing]

    # -- retained entries; on the event loop only

    def retain(self, nodeid: int) -> None:
        """The kernel, or a handle, knows this nodeid (once more)."""
        entry = self.get(nodeid)
        if entry is not None:
            # the number of the entry, not the caller's equal one: it costs no memory of its own
            self._counts[entry.nodeid] = self._counts.get(nodeid, 0) + 1

    def release(self, nodeid: int, count: int = 1) -> None:
        """Take back `count` calls of `retain`. More than there were are ignored: an earlier daemon's."""
        left = self._counts.get(nodeid, 0) - count
        if left > 0:
            self._counts[nodeid] = left
        else:
            self._counts.pop(nodeid, None)
            self._old.pop(nodeid, None)

    def retained(self) -> list[Entry]:
        """The entries that the kernel knows."""
        found = [self.get(nodeid) for nodeid in list(self._counts)]
        return [entry for entry in found if entry is not None]

    def _keep(self, before: Tree, after: Tree) -> None:
        for nodeid in before.by_id.keys() - after.by_id.keys():
            if nodeid in self._counts:
                self._old[nodeid] = before.by_id[nodeid]

    def _announce(self, found: Changes) -> None:
        self.generation += 1
        for nodeid in [each for each in self._old if self._current(each) is not None]:
            del self._old[nodeid]
        try:
            self.on_change(found)
        except Exception:
            _log.exception("telling of a change failed in an unforeseen way")

    def _taken_by_others(self, name: str) -> Callable[[int], bool]:
        def taken(number: int) -> bool:
            return any(
                number in listing.tree.by_id for other, listing in self._listings.items() if other != name
            )

        return taken


def _nothing(changes: Changes) -> None:
    pass
