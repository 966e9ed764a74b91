"""The tree of a mount: its entries, the nodeids that the kernel knows, and its freshness."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fusecache.catalog.entry import CatalogSource
from fusecache.catalog.index import EntryIndex
from fusecache.catalog.listings import SourceListings
from fusecache.catalog.retained import RetainedNodes
from fusecache.errors import ConfigError
from fusecache.events import EventHub


class Catalog:
    """One source at the root, or several as directories below it, in three parts.

    `index` answers from memory what is in the tree, for any thread. `nodes` keeps nodeids resolvable after their object
    changed. `listings` makes the tree fresh; only its `async` methods may wait for the origin.
    """

    def __init__(
        self,
        sources: Sequence[CatalogSource],
        *,
        events: EventHub,
        ttl: float,
        snapshot_dir: Path | None,
        negative_ttl: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The tree is empty until `listings.start()`. Raises ConfigError for sources that can't share a root."""
        names = [source.name for source in sources]
        if not sources or len(set(names)) != len(names) or ("" in names and len(names) > 1):
            raise ConfigError("several sources under one mount need a name each, all different")
        self.index = EntryIndex(sources)
        self.nodes = RetainedNodes(self.index)
        self.listings = SourceListings(
            sources,
            self.index,
            self.nodes,
            events=events,
            ttl=ttl,
            negative_ttl=negative_ttl,
            snapshot_dir=snapshot_dir,
            clock=clock,
        )
