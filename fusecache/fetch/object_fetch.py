"""The fetch of one object version: which blocks are wanted, in flight, or there.

The scheduling lock guards all of it, but for `stored`, which guards itself. `idle` tells the first state of a block
from the others; the store knows the last one.

| Block | Event | Next state |
|---|---|---|
| idle: no flight has it | a flight is planned over it | in flight |
| in flight | it arrives, and is stored | present |
| in flight | it arrives, and could only be handed to its waiters | idle |
| in flight | the flight ends without it | idle |
| present | the disk does not give it back | idle |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fusecache.blocks import block_length
from fusecache.errors import FusecacheError
from fusecache.fetch.block_source import Route
from fusecache.fetch.fetch_state import Backoff, FetchWaiters, Inspection
from fusecache.fetch.route_cursor import RouteCursor
from fusecache.fetch.waiter import Waiter
from fusecache.store.object import StoredObject
from fusecache.types import ObjectVersion


@dataclass(frozen=True)
class FlightPlan:
    """A flight to be: a run of blocks, all of them already in the data file but not verified, or all absent."""

    object_fetch: ObjectFetch
    blocks: range
    is_verification: bool
    urgent: bool = False
    """A reader waits for it."""
    owner: str | None = None
    """The node in whose window of prefetches it takes room."""


class ObjectFetch:
    """One object version that is read, or is going to be; shared by all its readers. Guarded by the scheduling lock."""

    def __init__(self, version: ObjectVersion, source: str, stored: StoredObject) -> None:
        self.version = version
        self.source = source
        self.stored = stored
        self.open_count = 0
        self.flight_count = 0
        """Flights under way."""
        self.fetch_whole = False
        """All of it is to be fetched: a reader opened or read it, or it was planned to be fetched ahead."""
        self.has_reader = False
        """A reader reads it through the daemon, piece by piece."""
        self.gone_error: FusecacheError | None = None
        """This version can't be had any more: blocks that are missing stay missing."""
        self.backoff = Backoff()
        self.idle = bytearray(int(not stored.is_present(block)) for block in range(stored.block_count))
        self.waiters = FetchWaiters()
        self.inspection = Inspection()
        self.read_position = 0
        """Block behind the last one that was asked for."""
        self.prefetch_mask: bytearray | None = None
        """A 1 for each block that is fetched without a waiter; None: all of them."""
        self.near_mask: bytearray | None = None
        """`prefetch_mask`, widened by what the kernel may read around a block of it; None as long as that is."""
        self.route: Route | None = None
        self._route_cursor: RouteCursor | None = None

    def byte_count(self, blocks: Iterable[int]) -> int:
        """Length of these blocks, in bytes."""
        size, block_size = self.version.size, self.stored.block_size
        return sum(block_length(block, size, block_size) for block in blocks)

    def has_idle_blocks(self) -> bool:
        """Whether a block is neither there nor in flight."""
        return self.idle.find(1) >= 0

    def set_route(self, route: Route | None) -> None:
        """From now on the stripes come from where `route` says; None: all from the origin."""
        self.route = route
        self._route_cursor = (
            None if route is None else RouteCursor(route, self.idle, self.stored.is_unverified)
        )

    def is_remote(self, block: int) -> bool:
        """Whether this block comes from another node: a node owns it, and it is not in the data file already."""
        return self._route_cursor is not None and self._route_cursor.is_remote(block)

    def belongs_in_store(self, block: int) -> bool:
        """Whether this block is stored here once it was fetched."""
        return self._route_cursor is None or self._route_cursor.belongs_in_store(block)

    def set_prefetch_mask(self, mask: bytearray | None, slack: int = 0) -> None:
        """Fetch without a waiter only blocks with a 1 in `mask`, None: all of them. `slack` is how many blocks beside
        such a one the kernel may ask for although no reader is after them."""
        self.prefetch_mask = mask
        self.near_mask = None if mask is None else _widened(mask, slack)

    def is_stray(self, block: int) -> bool:
        """Whether this block is far from all that are fetched without a waiter: the kernel did not read it around
        one of those."""
        return self.near_mask is not None and not self.near_mask[block]

    def plan_flight(
        self, block: int, limit: int, *, urgent: bool = False, owner: str | None = None
    ) -> FlightPlan:
        """The flight of at most `limit` blocks that begins with this idle one; they are in flight from now on. Ends at
        the end of the stripe, and with a prefetch mask where neither the mask nor a waiter wants the next block."""
        verify = self.stored.is_unverified(block)
        stop = block + 1
        end = min(len(self.idle), block + limit)
        if self.route is not None:
            end = min(end, (block // self.route.stripe_blocks + 1) * self.route.stripe_blocks)
        if self.prefetch_mask is not None and not self.is_stray(block):
            # the kernel reads around a fault: no reader wants the blocks behind it
            end = next(
                (
                    at
                    for at in range(stop, end)
                    if not (self.prefetch_mask[at] or at in self.waiters.by_block)
                ),
                end,
            )
        while stop < end and self.idle[stop] and self.stored.is_unverified(stop) == verify:
            stop += 1
        self.idle[block:stop] = bytes(stop - block)
        self.flight_count += 1
        return FlightPlan(self, range(block, stop), verify, urgent, owner)

    def plan_prefetch_flight(
        self, limit: int, remote: bool, prefetches_by_owner: Mapping[str, int]
    ) -> FlightPlan | None:
        """The next flight without a waiter: ahead of the reader, then what is left. With a route, only blocks that come
        from other nodes, or only the others. `prefetches_by_owner` says how much of each owner's window is taken."""
        if self.route is not None and self._route_cursor is not None:
            if remote and not self.route.stores_remote:
                return None
            position = self.read_position if self.has_reader else None
            block = self._route_cursor.next_block(remote, prefetches_by_owner, position)
            if block is None:
                return None
            owner = self.route.owner_of_stripe(block // self.route.stripe_blocks) if remote else None
            return self.plan_flight(block, limit, owner=owner)
        if remote:
            return None
        found = self.idle.find(1, self.read_position)
        if found < 0:
            found = self.idle.find(1)
        return None if found < 0 else self.plan_flight(found, limit)

    @property
    def origin_must_wait(self) -> bool:
        """Whether blocks from the origin, of this file and of those after it, wait for their turn."""
        return self._route_cursor is not None and self._route_cursor.origin_must_wait

    def return_blocks(self, blocks: Iterable[int]) -> list[int]:
        """Make those of these blocks idle that are not present; returns the ones with a waiter."""
        wanted = []
        for block in blocks:
            if not self.stored.is_present(block):
                self._make_idle(block)
            if block in self.waiters.by_block:
                wanted.append(block)
        return wanted

    def _make_idle(self, block: int) -> None:
        self.idle[block] = 1
        if self._route_cursor is not None:
            self._route_cursor.rewind()

    def block_arrived(self, block: int, piece: bytes | None) -> list[Waiter]:
        """A block is in the store, or only in `piece`: returns the waiters that have all of theirs now."""
        if piece is not None:
            self._make_idle(block)
        return self.waiters.block_arrived(block, piece)

    def flight_ended(self) -> None:
        """A flight that was planned is over."""
        self.flight_count -= 1

    def want_whole(self) -> None:
        """All of it is to be fetched."""
        self.fetch_whole = True

    def reader_asked(self, read_position: int) -> bool:
        """A reader reads it through the daemon, and asks for blocks up to `read_position`; returns whether nothing had
        wanted the whole file before."""
        is_first = not self.fetch_whole
        self.fetch_whole = self.has_reader = True
        self.read_position = read_position
        return is_first

    def give_up(self, error: FusecacheError | None) -> None:
        """This version can't be had any more, for this reason; None: it can."""
        self.gone_error = error

    def stays_partial(self) -> bool:
        """Whether it is not to be expected that all of it will be in the store soon."""
        elsewhere = self.route is not None and not self.route.stores_remote and 1 in self.route.remote_stripes
        return (
            elsewhere
            or bool(self.backoff.failure_count)
            or self.gone_error is not None
            or self.prefetch_mask is not None
        )

    def is_unused(self) -> bool:
        """Whether no reader has it open, nothing waits, and nothing is under way."""
        return not (self.open_count or self.flight_count or self.waiters or self.inspection.is_under_way)


def _widened(mask: bytearray, slack: int) -> bytearray:
    """`mask` with every run of ones `slack` blocks longer at both ends."""
    wide = bytearray(len(mask))
    start = mask.find(1)
    while start >= 0:
        stop = mask.find(0, start)
        stop = len(mask) if stop < 0 else stop
        first, last = max(0, start - slack), min(len(mask), stop + slack)
        wide[first:last] = b"\1" * (last - first)
        start = mask.find(1, stop)
    return wide
