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

from fusecache.blocks import block_bytes, block_range
from fusecache.errors import FusecacheError
from fusecache.loader.interface import Route
from fusecache.loader.waiters import Waiter
from fusecache.store.object import StoredObject
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from fusecache.loader.models import Model


@dataclass(frozen=True)
class Job:
    """A flight to be: a run of blocks, all of them already in the data file but not verified, or all absent."""

    load: ObjectLoad
    blocks: range
    verify: bool
    urgent: bool = False
    """A reader waits for it."""
    lane: str | None = None
    """The lane of its route that it takes room in."""


class Fold:
    """How far the sha256 of the whole object has come: `position` blocks, with all of what was found bad since taken
    into account if `discards` is still what the store says. Of who holds `ObjectLoad.looking`."""

    def __init__(self, discards: int) -> None:
        self.sha256 = hashlib.sha256()
        self.position = 0
        self.discards = discards


class ObjectLoad:
    """One object version that somebody reads, or is going to; shared by all who do."""

    def __init__(self, version: ObjectVersion, source: str, stored: StoredObject) -> None:
        self.version = version
        self.source = source
        self.stored = stored
        self.opens = 0
        self.jobs = 0
        """Flights under way."""
        self.read = False
        """Somebody opened or read it, so all of it is fetched."""
        self.being_read = False
        """Somebody reads it through the daemon, piece by piece."""
        self.gone: FusecacheError | None = None
        """This version can't be had any more: what is missing stays missing."""
        self.failures = 0
        self.resting_until = 0.0
        """No flight without a waiter before this time.monotonic(): the last ones failed."""
        self.idle = bytearray(int(not stored.present(block)) for block in range(stored.block_count))
        self.waiting: dict[int, list[Waiter]] = {}
        self.behind_seal: list[Waiter] = []
        """Who waits for all of it to be there, and for somebody to vouch for it."""
        self.fold = Fold(0)
        self.looking = False
        """Somebody is asked to look at what landed; counts as a job."""
        self.position = 0
        """Block behind the last one that was asked for."""
        self.model: Model | None = None
        """What it is a part of, if the order in which it is read can be learned; `file` is its number there."""
        self.file = 0
        self.wanted: bytearray | None = None
        """The blocks that a recording says will be read, 1 for each; None: all of them."""
        self.strayed = 0
        """Blocks that were read though they are far from any of those."""
        self.route: Route | None = None
        self._cursors = [0, 0]
        """Per kind (0: from the origin, 1: from nodes), where in the route's order the next idle block may be."""

    def bytes_of(self, blocks: Iterable[int]) -> int:
        """Length of these blocks."""
        size, block_size = self.version.size, self.stored.block_size
        return sum(block_bytes(block, size, block_size) for block in blocks)

    def has_idle(self) -> bool:
        """Whether a block is neither there nor in flight."""
        return self.idle.find(1) >= 0

    def follow(self, route: Route | None) -> None:
        """From now on the stripes come from where `route` says."""
        self.route = route
        self._cursors = [0, 0]

    def is_remote(self, block: int) -> bool:
        """Whether this block comes from another node: it has an owner, and is not on the disk already."""
        route = self.route
        if route is None or not route.remote[block // route.stripe]:
            return False
        return not self.stored.unverified(block)

    def keeps(self, block: int) -> bool:
        """Whether this block, once fetched, belongs into this node's store."""
        route = self.route
        return route is None or route.keep or not route.remote[block // route.stripe]

    def take(self, block: int, limit: int, *, urgent: bool = False, lane: str | None = None) -> Job:
        """The flight of at most `limit` blocks that begins with this idle one; see Job."""
        verify = self.stored.unverified(block)
        stop = block + 1
        end = min(len(self.idle), block + limit)
        if self.route is not None:
            end = min(end, (block // self.route.stripe + 1) * self.route.stripe)
        if self.wanted is not None and not self.strays(block):
            # what the kernel reads around a fault: nothing behind it is wanted by anybody
            end = next((at for at in range(stop, end) if not (self.wanted[at] or at in self.waiting)), end)
        while stop < end and self.idle[stop] and self.stored.unverified(stop) == verify:
            stop += 1
        self.idle[block:stop] = bytes(stop - block)
        self.jobs += 1
        return Job(self, range(block, stop), verify, urgent, lane)

    def heard(self, offset: int, length: int, process: int) -> None:
        """A reader, of this process, asks for these bytes. Without the lock; takes microseconds."""
        model = self.model
        if model is None:
            return
        model.heard = time.monotonic()
        recorder = model.recorder
        if recorder is not None:
            blocks = block_range(offset, length, self.version.size, self.stored.block_size)
            recorder.asked(self.file, blocks.start, blocks.stop, process)

    def is_listened_to(self) -> bool:
        """Whether what readers ask for ought to be what they are after, and little more."""
        return self.wanted is not None or (self.model is not None and self.model.learning)

    def strays(self, block: int) -> bool:
        """Whether this block is one that the recording knows nothing of, and not what the kernel reads beside one."""
        if self.wanted is None or self.model is None:
            return False
        near = self.model.edge
        return self.wanted.find(1, max(0, block - near), block + near + 1) < 0

    def is_urgent(self, block: int) -> bool:
        """Whether a reader waits for this block."""
        return any(waiter.urgent for waiter in self.waiting.get(block, ()))

    def take_ahead(self, limit: int, remote: bool, taken: Mapping[str, int]) -> Job | None:
        """The next flight nobody waits for: ahead of the reader, then what is left. With a route, only what comes
        from other nodes, or only what does not. `taken` is how much of each lane's window is taken."""
        if self.route is not None:
            if remote and not self.route.keep:
                return None
            block = self._routed(self.route, remote, taken)
            if block is None:
                return None
            lane = self.route.lane(block // self.route.stripe) if remote else None
            return self.take(block, limit, lane=lane)
        if remote:
            return None
        block = self.idle.find(1, self.position)
        if block < 0:
            block = self.idle.find(1)
        return None if block < 0 else self.take(block, limit)

    def _routed(self, route: Route, remote: bool, taken: Mapping[str, int]) -> int | None:
        if self.being_read:
            block = self.idle.find(1, self.position, self.position + route.stripe)
            if block >= 0 and self.is_remote(block) is remote:
                return block
        first = None
        full: set[str | None] = set()
        for at in range(self._cursors[remote], len(route.order)):
            stripe = route.order[at]
            lane = route.lane(stripe) if remote else None
            if lane in full:
                continue
            start = stripe * route.stripe
            block = self.idle.find(1, start, start + route.stripe)
            if block < 0 or self.is_remote(block) is not remote:
                continue
            if first is None:
                first = self._cursors[remote] = at
            if not remote and route.in_order and at > self._reached(route):
                return None
            if lane is None or taken.get(lane, 0) < route.window:
                return block
            full.add(lane)
        if first is None:
            self._cursors[remote] = len(route.order)
        return None

    def _reached(self, route: Route) -> int:
        """Where in the route's order the first stripe is that nobody fetches yet from another node."""
        order = route.order
        for at in range(self._cursors[1], len(order)):
            block = self.idle.find(1, order[at] * route.stripe, (order[at] + 1) * route.stripe)
            if block >= 0 and self.is_remote(block):
                self._cursors[1] = at
                return at
        self._cursors[1] = len(order)
        return len(order)

    @property
    def in_turn(self) -> bool:
        """Whether what comes from the origin, of this file and of those after it, waits for its turn."""
        route = self.route
        return route is not None and route.in_order and self._reached(route) < len(route.order)

    def give_back(self, blocks: Iterable[int]) -> list[int]:
        """Make blocks idle that a flight did not land; returns those that somebody waits for."""
        wanted = []
        for block in blocks:
            if not self.stored.present(block):
                self.idle[block] = 1
                self._cursors = [0, 0]
            if block in self.waiting:
                wanted.append(block)
        return wanted

    def land(self, block: int, piece: bytes | None) -> list[Waiter]:
        """A block is in the store, or in `piece`: returns the waiters that have all of theirs now."""
        if piece is not None:
            self.idle[block] = 1
            self._cursors = [0, 0]
        complete = []
        for waiter in self.waiting.pop(block, ()):
            waiter.missing.discard(block)
            if piece is not None:
                waiter.pieces[block] = piece
            if not waiter.missing:
                complete.append(waiter)
        return complete

    def wait(self, waiter: Waiter) -> bool:
        """Somebody waits here; whether it is for all of the object."""
        if waiter.sealed:
            self.behind_seal.append(waiter)
            self.resting_until = 0.0
        for block in waiter.missing:
            self.waiting.setdefault(block, []).append(waiter)
        return waiter.sealed

    def drop(self, waiter: Waiter) -> None:
        """Nobody waits here any more."""
        if waiter in self.behind_seal:
            self.behind_seal.remove(waiter)
        for block in waiter.missing:
            waiters = self.waiting.get(block)
            if waiters is not None and waiter in waiters:
                waiters.remove(waiter)
                if not waiters:
                    del self.waiting[block]

    def stays_partial(self) -> bool:
        """Whether it is not to be expected that all of it will be in the store soon."""
        elsewhere = self.route is not None and not self.route.keep and 1 in self.route.remote
        return elsewhere or bool(self.failures) or self.gone is not None or self.wanted is not None

    def to_look_at(self) -> bool:
        """Whether more of a sealed object is there than was looked at, or somebody waits for the last look at it."""
        stored = self.stored
        if not stored.sealed or self.looking or self.gone is not None:
            return False
        done = self.fold.position if self.fold.discards == stored.discards else 0
        return stored.present(done) if done < stored.block_count else bool(self.behind_seal)

    def unwanted(self) -> bool:
        """Whether it can be closed: nobody has it open, and nothing is or will be under way."""
        return not (self.opens or self.jobs or self.waiting or self.behind_seal)
