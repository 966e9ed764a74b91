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

ChangedNames = list[tuple[NodeId, bytes]]
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
        self.on_change: Callable[[ChangedNames], None] = _ignore_changes
        self._ttl = ttl
        self._negative_ttl = ttl if negative_ttl is None else negative_ttl
        self._retain_counts: dict[int, int] = {}
        """nodeid -> lookups the kernel has not forgotten, and open handles."""
        self._detached_entries: dict[int, Entry] = {}
        """Entries that are in no tree any more and retained."""
        self._trio_token: trio.lowlevel.TrioToken | None = None
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
                is_taken=self._make_is_taken(source.name),
                before_swap=self._detach_retained,
                after_swap=self._report_changes,
                born_ns=born_ns,
            )
        self._shared_root: Entry | None = None
        if "" not in self._listings:
            self._shared_root = Entry(ROOT, ROOT, b"", "", True, None, "", 0, born_ns)

    # -- life

    async def start(self) -> None:
        """Make the first listing of every source. A source that fails is an entry that can't be opened until a later
        attempt lists it; raises the OriginError when all of them fail."""
        self._trio_token = trio.lowlevel.current_trio_token()
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

    async def refresh_if_stale(self, entry: Entry | None = None) -> None:
        """Join or begin a refresh where the listing (of this entry's source) is older than the ttl; wait at most
        2 s since it began, then go on with what there is."""
        for listing in self._listings_of(entry):
            await listing.refresh_if_stale(self._ttl)

    def report_stale_version(self, entry: Entry) -> None:
        """The origin no longer has this entry's version, as a reader found out. Thread-safe; does not block. The
        object is asked for again at once, and a LOOKUP of it waits for the answer."""
        listing = self._listings.get(entry.source)
        if (
            listing is None
            or entry.version is None
            or listing.tree.entries_by_id.get(entry.nodeid) is not entry
        ):
            return
        listing.unconfirmed_nodeids.add(entry.nodeid)
        if self._trio_token is not None:
            self._trio_token.run_sync_soon(listing.start_object_check, entry, idempotent=True)

    # -- names

    async def lookup_fresh(self, parent: int, name: bytes) -> Entry | None:
        """What LOOKUP answers: the child as of a fresh listing, or None. Raises OriginError below a source that
        could never be listed: nothing is known then, also not that the name does not exist."""
        entry = self.lookup(parent, name)
        above = self.entry_by_nodeid(parent) if entry is None else entry
        if above is None:
            return None
        listing = self._listings.get(above.source)
        if listing is None or (self._shared_root is not None and parent == ROOT):
            return entry
        ttl = self._negative_ttl if entry is None else self._ttl
        if entry is not None and entry.nodeid in listing.unconfirmed_nodeids:
            await listing.wait_object_check(entry)
        else:
            await listing.refresh_if_stale(ttl)
        if not listing.has_listing and listing.last_error is not None:
            raise listing.last_error
        return self.lookup(parent, name)

    def lookup(self, parent: int, name: bytes) -> Entry | None:
        """The child of a directory, from memory."""
        if self._shared_root is not None and parent == ROOT:
            return next((entry for entry in self.children(ROOT) if entry.name == name), None)
        for listing in self._listings.values():
            if (entry := listing.tree.lookup(parent, name)) is not None:
                return entry
        return None

    def entry_by_nodeid(self, nodeid: int) -> Entry | None:
        """The entry behind a nodeid, also one that is retained only."""
        if nodeid == ROOT and self._shared_root is not None:
            return self._shared_root
        return self._current_entry(nodeid) or self._detached_entries.get(nodeid)

    def is_current(self, nodeid: int) -> bool:
        """Whether this nodeid is in the tree, and not only retained."""
        return (nodeid == ROOT and self._shared_root is not None) or self._current_entry(nodeid) is not None

    def _current_entry(self, nodeid: int) -> Entry | None:
        for listing in self._listings.values():
            if (entry := listing.tree.entries_by_id.get(nodeid)) is not None:
                return entry
        return None

    def entry_by_path(self, path: str) -> Entry | None:
        """The entry at a path relative to the mountpoint ('' is the root)."""
        entry = self.entry_by_nodeid(ROOT)
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
        if self._shared_root is not None and nodeid == ROOT:
            return sorted(
                (listing.tree.root for listing in self._listings.values()), key=lambda each: each.name
            )
        for listing in self._listings.values():
            if (found := listing.tree.children_by_id.get(nodeid)) is not None:
                return found
        return ()

    def scan_directory(self, nodeid: int, cursor: int) -> Iterator[tuple[int, Entry]]:
        """The children of a directory behind a directory offset, each with its own offset (>= 3).

        Offsets are hashes of names: a scan that goes on after a refresh, or after a restart, meets each name that was
        there all the time exactly once.
        """
        if self._shared_root is not None and nodeid == ROOT:
            for at, entry in enumerate(
                self.children(ROOT), FIRST_CURSOR
            ):  # sources don't change during a mount
                if at > cursor:
                    yield at, entry
            return
        for listing in self._listings.values():
            if nodeid in listing.tree.children_by_id:
                yield from listing.tree.scan_directory(nodeid, cursor)
                return

    async def require_fresh_listing(self, entry: Entry) -> None:
        """Before a directory is read: have a fresh listing. Raises OriginError where there never was one."""
        listing = self._listings.get(entry.source)
        if listing is None or entry is self._shared_root:
            return
        await listing.refresh_if_stale(self._ttl)
        if not listing.has_listing and listing.last_error is not None:
            raise listing.last_error

    def walk_entries(self) -> Iterator[Entry]:
        """All entries below the root, depth first."""
        for name in sorted(self._listings):
            tree = self._listings[name].tree
            if self._shared_root is not None:
                yield tree.root
            yield from tree.walk_entries()

    def siblings(self, entry: Entry) -> Sequence[Entry]:
        """The entries of the directory that this one is in, itself included, sorted by name."""
        return self.children(entry.parent)

    # -- how long the kernel may trust it

    def remaining_ttl(self, entry: Entry) -> float:
        """Seconds for which what is known of this entry may be trusted."""
        return min((each.remaining_ttl(self._ttl) for each in self._listings_of(entry)), default=self._ttl)

    def remaining_negative_ttl(self, parent: int) -> float:
        """Seconds for which a name may be trusted not to be in this directory."""
        listings = self._listings_of(self.entry_by_nodeid(parent))
        return min((each.remaining_ttl(self._negative_ttl) for each in listings), default=self._negative_ttl)

    @property
    def oldest_listing_age(self) -> float:
        """Seconds since the oldest listing that is served; of a source that was never listed: since ever (-1)."""
        oldest = max(listing.age for listing in self._listings.values())
        return oldest if math.isfinite(oldest) else -1.0

    @property
    def totals(self) -> tuple[int, int]:
        """Files, and their bytes."""
        trees = [listing.tree for listing in self._listings.values()]
        return sum(tree.file_count for tree in trees), sum(tree.total_bytes for tree in trees)

    def origin_identity(self, entry: Entry) -> str:
        """The canonical identity of the origin behind an entry; '' for a root that several sources share."""
        listing = self._listings.get(entry.source)
        return "" if listing is None or entry is self._shared_root else listing.source.identity

    @property
    def listing_errors(self) -> dict[str, str]:
        """Source -> why its last listing failed."""
        return {
            name: str(each.last_error) for name, each in self._listings.items() if each.last_error is not None
        }

    def _listings_of(self, entry: Entry | None) -> list[Listing]:
        if entry is None:
            return list(self._listings.values())
        listing = self._listings.get(entry.source)
        return [] if listing is None or entry is self._shared_root else [listing]

    # -- retained entries; on the event loop only

    def retain_nodeid(self, nodeid: int) -> None:
        """The kernel, or a handle, knows this nodeid (once more)."""
        entry = self.entry_by_nodeid(nodeid)
        if entry is not None:
            # the number of the entry, not the caller's equal one: it costs no memory of its own
            self._retain_counts[entry.nodeid] = self._retain_counts.get(nodeid, 0) + 1

    def release_nodeid(self, nodeid: int, count: int = 1) -> None:
        """Take back `count` calls of `retain`. More than there were are ignored: an earlier daemon's."""
        left = self._retain_counts.get(nodeid, 0) - count
        if left > 0:
            self._retain_counts[nodeid] = left
        else:
            self._retain_counts.pop(nodeid, None)
            self._detached_entries.pop(nodeid, None)

    def retained_entries(self) -> list[Entry]:
        """The entries that the kernel knows."""
        found = [self.entry_by_nodeid(nodeid) for nodeid in list(self._retain_counts)]
        return [entry for entry in found if entry is not None]

    def _detach_retained(self, before: Tree, after: Tree) -> None:
        for nodeid in before.entries_by_id.keys() - after.entries_by_id.keys():
            if nodeid in self._retain_counts:
                self._detached_entries[nodeid] = before.entries_by_id[nodeid]

    def _report_changes(self, found: ChangedNames) -> None:
        self.generation += 1
        for nodeid in [each for each in self._detached_entries if self._current_entry(each) is not None]:
            del self._detached_entries[nodeid]
        try:
            self.on_change(found)
        except Exception:
            _log.exception("telling of a change failed in an unforeseen way")

    def _make_is_taken(self, name: str) -> Callable[[int], bool]:
        def taken(number: int) -> bool:
            return any(
                number in listing.tree.entries_by_id
                for other, listing in self._listings.items()
                if other != name
            )

        return taken


def _ignore_changes(changes: ChangedNames) -> None:
    pass
