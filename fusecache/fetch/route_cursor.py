"""Which idle block of an object with a route is fetched next before a reader asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fusecache.fetch.block_source import Route


class RouteCursor:
    """Finds the idle blocks of one object in the order of its route. Guarded by the scheduling lock, like `idle`, which
    has a 1 for each block that is neither stored nor in flight.

    | Event | Position, for blocks from the origin and for blocks from nodes |
    |---|---|
    | a search passes stripes without an idle block of its kind | behind them |
    | a block becomes idle again (`rewind`) | at the beginning |
    """

    def __init__(self, route: Route, idle: bytearray, is_unverified: Callable[[int], bool]) -> None:
        self._route = route
        self._idle = idle
        self._is_unverified = is_unverified
        self._positions = [0, 0]
        """Per kind (0: from the origin, 1: from nodes), where in the route's order the next idle block may be."""

    def rewind(self) -> None:
        """A block became idle: search from the beginning."""
        self._positions = [0, 0]

    def is_remote(self, block: int) -> bool:
        """Whether this block comes from another node: a node owns it, and it is not in the data file already."""
        return bool(
            self._route.remote_stripes[block // self._route.stripe_blocks]
        ) and not self._is_unverified(block)

    def belongs_in_store(self, block: int) -> bool:
        """Whether this block is stored here once it was fetched."""
        return self._route.stores_remote or not self._route.remote_stripes[block // self._route.stripe_blocks]

    def next_block(
        self, remote: bool, prefetches_by_owner: Mapping[str, int], read_position: int | None
    ) -> int | None:
        """The next idle block that comes from other nodes, or that does not; None: none may be fetched now. Blocks of
        the stripe behind `read_position`, where a reader is, go first. `prefetches_by_owner` says how much of each
        owner's window is taken."""
        route = self._route
        if read_position is not None:
            block = self._idle.find(1, read_position, read_position + route.stripe_blocks)
            if block >= 0 and self.is_remote(block) is remote:
                return block
        first = None
        full: set[str | None] = set()
        for at in range(self._positions[remote], len(route.prefetch_order)):
            stripe = route.prefetch_order[at]
            owner = route.owner_of_stripe(stripe) if remote else None
            if owner in full:
                continue
            start = stripe * route.stripe_blocks
            block = self._idle.find(1, start, start + route.stripe_blocks)
            if block < 0 or self.is_remote(block) is not remote:
                continue
            if first is None:
                first = self._positions[remote] = at
            if not remote and route.is_origin_ordered and at > self._next_remote_position():
                return None
            if owner is None or prefetches_by_owner.get(owner, 0) < route.prefetch_window:
                return block
            full.add(owner)
        if first is None:
            self._positions[remote] = len(route.prefetch_order)
        return None

    @property
    def origin_must_wait(self) -> bool:
        """Whether blocks from the origin wait until all blocks from other nodes are taken."""
        return self._route.is_origin_ordered and self._next_remote_position() < len(
            self._route.prefetch_order
        )

    def _next_remote_position(self) -> int:
        """Where in the route's order the first stripe is of which no flight has taken the blocks that come from
        another node."""
        order, blocks = self._route.prefetch_order, self._route.stripe_blocks
        for at in range(self._positions[1], len(order)):
            block = self._idle.find(1, order[at] * blocks, (order[at] + 1) * blocks)
            if block >= 0 and self.is_remote(block):
                self._positions[1] = at
                return at
        self._positions[1] = len(order)
        return len(order)
