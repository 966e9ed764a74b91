"""The fetch of one object version: which blocks are wanted, in flight, or there.

All of it is guarded by the loader's lock, but for `stored`, which guards itself. A block is idle (nobody is
on it), in flight, or present in the store; `idle` knows the first from the others. A flight takes a run of
idle blocks and gives back those it did not land.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusecache.blocks import block_length, block_range
from fusecache.errors import FusecacheError
from fusecache.fetch.block_source import Route
from fusecache.fetch.waiter import Waiter
from fusecache.store.object import StoredObject
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from fusecache.prefetch.models.shards import ModelShards


@dataclass(frozen=True)
class FlightPlan:
    """A flight to be: a run of blocks, all of them already in the data file but not verified, or all absent."""

    object_fetch: ObjectFetch
    blocks: range
    is_verification: bool
    urgent: bool = False
    """A reader waits for it."""
    owner: str | None = None
    """The lane of its route that it takes room in."""


class HashProgress:
    """How far the sha256 of the whole object has come: `position` blocks, with all of what was found bad since taken
    into account if `discards` is still what the store says. Of who holds `ObjectFetch.is_being_inspected`."""

    def __init__(self, discards: int) -> None:
        self.sha256 = hashlib.sha256()
        self.hashed_blocks = 0
        self.discards = discards


class ObjectFetch:
    """One object version that somebody reads, or is going to; shared by all who do."""

    def __init__(self, version: ObjectVersion, source: str, stored: StoredObject) -> None:
        self.version = version
        self.source = source
        self.stored = stored
        self.open_count = 0
        self.flight_count = 0
        """Flights under way."""
        self.fetch_whole = False
        """Somebody opened or read it, so all of it is fetched."""
        self.has_reader = False
        """Somebody reads it through the daemon, piece by piece."""
        self.gone_error: FusecacheError | None = None
        """This version can't be had any more: what is missing stays missing."""
        self.failure_count = 0
        self.backoff_until = 0.0
        """No flight without a waiter before this time.monotonic(): the last ones failed."""
        self.idle = bytearray(int(not stored.is_present(block)) for block in range(stored.block_count))
        self.waiters_by_block: dict[int, list[Waiter]] = {}
        self.attestation_waiters: list[Waiter] = []
        """Who waits for all of it to be there, and for somebody to vouch for it."""
        self.hash_progress = HashProgress(0)
        self.is_being_inspected = False
        """Somebody is asked to look at what landed; counts as a job."""
        self.read_position = 0
        """Block behind the last one that was asked for."""
        self.model: ModelShards | None = None
        """What it is a part of, if the order in which it is read can be learned; `file` is its number there."""
        self.file_number = 0
        self.prefetch_mask: bytearray | None = None
        """The blocks that a recording says will be read, 1 for each; None: all of them."""
        self.stray_count = 0
        """Blocks that were read though they are far from any of those."""
        self.route: Route | None = None
        self._route_cursors = [0, 0]
        """Per kind (0: from the origin, 1: from nodes), where in the route's order the next idle block may be."""

    def byte_count(self, blocks: Iterable[int]) -> int:
        """Length of these blocks."""
        size, block_size = self.version.size, self.stored.block_size
        return sum(block_length(block, size, block_size) for block in blocks)

    def has_idle_blocks(self) -> bool:
        """Whether a block is neither there nor in flight."""
        return self.idle.find(1) >= 0

    def set_route(self, route: Route | None) -> None:
        """From now on the stripes come from where `route` says."""
        self.route = route
        self._route_cursors = [0, 0]

    def is_remote(self, block: int) -> bool:
        """Whether this block comes from another node: it has an owner, and is not on the disk already."""
        route = self.route
        if route is None or not route.remote_stripes[block // route.stripe_blocks]:
            return False
        return not self.stored.is_unverified(block)

    def belongs_in_store(self, block: int) -> bool:
        """Whether this block, once fetched, belongs into this node's store."""
        route = self.route
        return route is None or route.stores_remote or not route.remote_stripes[block // route.stripe_blocks]

    def plan_flight(
        self, block: int, limit: int, *, urgent: bool = False, owner: str | None = None
    ) -> FlightPlan:
        """The flight of at most `limit` blocks that begins with this idle one; see Job."""
        verify = self.stored.is_unverified(block)
        stop = block + 1
        end = min(len(self.idle), block + limit)
        if self.route is not None:
            end = min(end, (block // self.route.stripe_blocks + 1) * self.route.stripe_blocks)
        if self.prefetch_mask is not None and not self.is_stray(block):
            # what the kernel reads around a fault: nothing behind it is wanted by anybody
            end = next(
                (
                    at
                    for at in range(stop, end)
                    if not (self.prefetch_mask[at] or at in self.waiters_by_block)
                ),
                end,
            )
        while stop < end and self.idle[stop] and self.stored.is_unverified(stop) == verify:
            stop += 1
        self.idle[block:stop] = bytes(stop - block)
        self.flight_count += 1
        return FlightPlan(self, range(block, stop), verify, urgent, owner)

    def record_read(self, offset: int, length: int, process: int) -> None:
        """A reader, of this process, asks for these bytes. Without the lock; takes microseconds."""
        model = self.model
        if model is None:
            return
        model.last_read_at = time.monotonic()
        recorder = model.recorder
        if recorder is not None:
            blocks = block_range(offset, length, self.version.size, self.stored.block_size)
            recorder.record_read(self.file_number, blocks.start, blocks.stop, process)

    def needs_exact_reads(self) -> bool:
        """Whether what readers ask for ought to be what they are after, and little more."""
        return self.prefetch_mask is not None or (self.model is not None and self.model.is_learning)

    def is_stray(self, block: int) -> bool:
        """Whether this block is one that the recording knows nothing of, and not what the kernel reads beside one."""
        if self.prefetch_mask is None or self.model is None:
            return False
        near = self.model.readahead_slack
        return self.prefetch_mask.find(1, max(0, block - near), block + near + 1) < 0

    def has_urgent_waiter(self, block: int) -> bool:
        """Whether a reader waits for this block."""
        return any(waiter.urgent for waiter in self.waiters_by_block.get(block, ()))

    def plan_prefetch_flight(
        self, limit: int, remote: bool, prefetches_by_owner: Mapping[str, int]
    ) -> FlightPlan | None:
        """The next flight nobody waits for: ahead of the reader, then what is left. With a route, only what comes
        from other nodes, or only what does not. `taken` is how much of each lane's window is taken."""
        if self.route is not None:
            if remote and not self.route.stores_remote:
                return None
            block = self._next_routed_block(self.route, remote, prefetches_by_owner)
            if block is None:
                return None
            lane = self.route.owner_of_stripe(block // self.route.stripe_blocks) if remote else None
            return self.plan_flight(block, limit, owner=lane)
        if remote:
            return None
        block = self.idle.find(1, self.read_position)
        if block < 0:
            block = self.idle.find(1)
        return None if block < 0 else self.plan_flight(block, limit)

    def _next_routed_block(
        self, route: Route, remote: bool, prefetches_by_owner: Mapping[str, int]
    ) -> int | None:
        if self.has_reader:
            block = self.idle.find(1, self.read_position, self.read_position + route.stripe_blocks)
            if block >= 0 and self.is_remote(block) is remote:
                return block
        first = None
        full: set[str | None] = set()
        for at in range(self._route_cursors[remote], len(route.prefetch_order)):
            stripe = route.prefetch_order[at]
            lane = route.owner_of_stripe(stripe) if remote else None
            if lane in full:
                continue
            start = stripe * route.stripe_blocks
            block = self.idle.find(1, start, start + route.stripe_blocks)
            if block < 0 or self.is_remote(block) is not remote:
                continue
            if first is None:
                first = self._route_cursors[remote] = at
            if not remote and route.is_origin_ordered and at > self._next_remote_position(route):
                return None
            if lane is None or prefetches_by_owner.get(lane, 0) < route.prefetch_window:
                return block
            full.add(lane)
        if first is None:
            self._route_cursors[remote] = len(route.prefetch_order)
        return None

    def _next_remote_position(self, route: Route) -> int:
        """Where in the route's order the first stripe is that nobody fetches yet from another node."""
        order = route.prefetch_order
        for at in range(self._route_cursors[1], len(order)):
            block = self.idle.find(1, order[at] * route.stripe_blocks, (order[at] + 1) * route.stripe_blocks)
            if block >= 0 and self.is_remote(block):
                self._route_cursors[1] = at
                return at
        self._route_cursors[1] = len(order)
        return len(order)

    @property
    def origin_must_wait(self) -> bool:
        """Whether what comes from the origin, of this file and of those after it, waits for its turn."""
        route = self.route
        return (
            route is not None
            and route.is_origin_ordered
            and self._next_remote_position(route) < len(route.prefetch_order)
        )

    def return_blocks(self, blocks: Iterable[int]) -> list[int]:
        """Make blocks idle that a flight did not land; returns those that somebody waits for."""
        wanted = []
        for block in blocks:
            if not self.stored.is_present(block):
                self.idle[block] = 1
                self._route_cursors = [0, 0]
            if block in self.waiters_by_block:
                wanted.append(block)
        return wanted

    def block_arrived(self, block: int, piece: bytes | None) -> list[Waiter]:
        """A block is in the store, or in `piece`: returns the waiters that have all of theirs now."""
        if piece is not None:
            self.idle[block] = 1
            self._route_cursors = [0, 0]
        complete = []
        for waiter in self.waiters_by_block.pop(block, ()):
            waiter.missing_blocks.discard(block)
            if piece is not None:
                waiter.pieces[block] = piece
            if not waiter.missing_blocks:
                complete.append(waiter)
        return complete

    def add_waiter(self, waiter: Waiter) -> bool:
        """Somebody waits here; whether it is for all of the object."""
        if waiter.awaits_attestation:
            self.attestation_waiters.append(waiter)
            self.backoff_until = 0.0
        for block in waiter.missing_blocks:
            self.waiters_by_block.setdefault(block, []).append(waiter)
        return waiter.awaits_attestation

    def drop_waiter(self, waiter: Waiter) -> None:
        """Nobody waits here any more."""
        if waiter in self.attestation_waiters:
            self.attestation_waiters.remove(waiter)
        for block in waiter.missing_blocks:
            waiters = self.waiters_by_block.get(block)
            if waiters is not None and waiter in waiters:
                waiters.remove(waiter)
                if not waiters:
                    del self.waiters_by_block[block]

    def stays_partial(self) -> bool:
        """Whether it is not to be expected that all of it will be in the store soon."""
        elsewhere = self.route is not None and not self.route.stores_remote and 1 in self.route.remote_stripes
        return (
            elsewhere
            or bool(self.failure_count)
            or self.gone_error is not None
            or self.prefetch_mask is not None
        )

    def needs_inspection(self) -> bool:
        """Whether more of a sealed object is there than was looked at, or somebody waits for the last look at it."""
        stored = self.stored
        if not stored.is_unattested or self.is_being_inspected or self.gone_error is not None:
            return False
        done = (
            self.hash_progress.hashed_blocks
            if self.hash_progress.discards == stored.blocks.bad_block_count
            else 0
        )
        return stored.is_present(done) if done < stored.block_count else bool(self.attestation_waiters)

    def is_unused(self) -> bool:
        """Whether it can be closed: nobody has it open, and nothing is or will be under way."""
        return not (self.open_count or self.flight_count or self.waiters_by_block or self.attestation_waiters)
