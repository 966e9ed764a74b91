"""The freshness of the tree: the listings of all sources of a mount."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import trio

from fusecache.catalog.entry import ROOT, CatalogSource, Entry
from fusecache.catalog.index import EntryIndex
from fusecache.catalog.listing import Listing
from fusecache.catalog.object_checks import ObjectChecks
from fusecache.catalog.retained import RetainedNodes
from fusecache.catalog.source_tree import SourceTree
from fusecache.errors import FusecacheError
from fusecache.events import EventHub
from fusecache.types import ObjectVersion


class SourceListings:
    """The Listing and the ObjectChecks of each source. Belongs to the event loop, but for `report_stale_version` and
    `report_gone_version`, which any thread may call. `async` methods may wait for the origin.

    `ttl` is how many seconds a listing is trusted for names that are in it, `negative_ttl` (the same unless given) for
    names that are not. Listings are saved in `snapshot_dir`; None: nowhere. A change of a tree is published as
    `names_changed`; `object_gone` makes the origin be asked about that object.
    """

    def __init__(
        self,
        sources: Sequence[CatalogSource],
        index: EntryIndex,
        retained: RetainedNodes,
        *,
        events: EventHub,
        ttl: float,
        negative_ttl: float | None = None,
        snapshot_dir: Path | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._index = index
        self._retained = retained
        self._ttl = ttl
        self._negative_ttl = ttl if negative_ttl is None else negative_ttl
        self._trio_token: trio.lowlevel.TrioToken | None = None
        limiter = trio.CapacityLimiter(len(sources) + 8)
        self._listings: dict[str, Listing] = {}
        self._checks: dict[str, ObjectChecks] = {}
        for source in sources:
            tree = SourceTree(source, index, retained, events.names_changed)
            self._checks[source.name] = ObjectChecks(tree, limiter)
            self._listings[source.name] = Listing(tree, directory=snapshot_dir, clock=clock, limiter=limiter)
        events.object_gone.subscribe(self.report_gone_version)

    # -- listing

    async def start(self) -> None:
        """Make the first listing of every source. A source that fails is an entry that can't be opened until a later
        attempt lists it; raises the OriginError when all of them fail."""
        self._trio_token = trio.lowlevel.current_trio_token()
        errors = await self._for_all_listings(Listing.start)
        if len(errors) == len(self._listings):
            raise errors[0]

    async def refresh(self) -> None:
        """List all sources anew, beginning after this call. Raises the first OriginError; the trees of the sources that
        could be listed are fresh all the same."""
        errors = await self._for_all_listings(Listing.refresh)
        if errors:
            raise errors[0]

    async def _for_all_listings(self, work: Callable[[Listing], Awaitable[None]]) -> list[FusecacheError]:
        """Do this with all listings at once; the errors of those that fail."""
        errors: list[FusecacheError] = []

        async def work_on_one(listing: Listing) -> None:
            try:
                await work(listing)
            except FusecacheError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for listing in self._listings.values():
                nursery.start_soon(work_on_one, listing)
        return errors

    async def refresh_if_stale(self, entry: Entry | None = None) -> None:
        """Have the listing (of this entry's source; None: of all) no older than the ttl: join or begin a refresh, and
        wait for it until 2 s after it began. Afterwards the tree may be the one before."""
        for listing in self._listings_of(entry):
            await listing.refresh_if_stale(self._ttl)

    async def require_fresh_listing(self, entry: Entry) -> None:
        """Before a directory is read: have a fresh listing, as `refresh_if_stale`. Raises OriginError when its source
        could never be listed."""
        for listing in self._listings_of(entry):
            await listing.refresh_if_stale(self._ttl)
            listing.raise_if_never_listed()

    async def lookup_fresh(self, parent: int, name: bytes) -> Entry | None:
        """The answer to LOOKUP: the child as of a fresh listing, or None. Raises OriginError below a source that could
        never be listed: nothing is known then, also not that the name does not exist."""
        entry = self._index.lookup(parent, name)
        above = self._retained.entry_by_nodeid(parent) if entry is None else entry
        if above is None:
            return None
        listing = self._listings.get(above.source)
        if listing is None or (parent == ROOT and self._index.shared_root is not None):
            return entry
        checks = self._checks[above.source]
        if entry is not None and checks.is_in_doubt(entry):
            await checks.wait_for_check(entry)
        else:
            await listing.refresh_if_stale(self._negative_ttl if entry is None else self._ttl)
        listing.raise_if_never_listed()
        return self._index.lookup(parent, name)

    # -- objects that changed

    def report_stale_version(self, entry: Entry) -> None:
        """Tell that the origin no longer has this entry's version, as a reader found out. Thread-safe; does not block.
        The origin is asked for the object at once, and a LOOKUP of it waits for the answer."""
        checks = self._checks.get(entry.source)
        if checks is not None and checks.doubt_version(entry) and self._trio_token is not None:
            self._trio_token.run_sync_soon(checks.start_check, entry, idempotent=True)

    def report_gone_version(self, version: ObjectVersion) -> None:
        """The same for the file that shows this version; nothing if there is none. Thread-safe; does not block."""
        entry = self._index.entry_of_version(version)
        if entry is not None:
            self.report_stale_version(entry)

    # -- how long the kernel may trust it

    def remaining_ttl(self, entry: Entry) -> float:
        """Seconds for which the kernel may trust what it is told of this entry."""
        return min((each.remaining_ttl(self._ttl) for each in self._listings_of(entry)), default=self._ttl)

    def remaining_negative_ttl(self, parent: int) -> float:
        """Seconds for which the kernel may trust that a name is not in this directory."""
        listings = self._listings_of(self._retained.entry_by_nodeid(parent))
        return min((each.remaining_ttl(self._negative_ttl) for each in listings), default=self._negative_ttl)

    @property
    def oldest_age(self) -> float:
        """Seconds since the oldest listing that is served began; -1 when a source was never listed."""
        oldest = max(listing.age for listing in self._listings.values())
        return oldest if math.isfinite(oldest) else -1.0

    # -- sources

    def origin_identity(self, entry: Entry) -> str:
        """The canonical identity of the origin behind an entry; '' for a root that several sources share."""
        return next((listing.source.identity for listing in self._listings_of(entry)), "")

    @property
    def errors(self) -> dict[str, str]:
        """Name of a source -> why its last listing failed, of the sources whose last listing did."""
        return {
            name: str(each.last_error) for name, each in self._listings.items() if each.last_error is not None
        }

    def _listings_of(self, entry: Entry | None) -> list[Listing]:
        """The listing of the entry's source, none for the shared root; all listings for None."""
        if entry is None:
            return list(self._listings.values())
        listing = self._listings.get(entry.source)
        return [] if listing is None or entry is self._index.shared_root else [listing]
