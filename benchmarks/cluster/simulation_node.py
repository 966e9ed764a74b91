"""One simulated node: the project's own scheduling, joined by what stands in for threads, sockets and disks.

What is fetched next is decided by Board and ObjectLoad (fusecache/loader), where from by choice.turns and
choice.Asking, who passes what on by choice.Spread, all of them fed as Loader, Exchange and Holdings feed them. A flight
is a generator that stands for the thread that does it. The crews have the sizes that Loader.start gives them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from benchmarks.cluster.simulation_network import Stream
from benchmarks.cluster.simulation_server import Request, Server
from benchmarks.cluster.simulation_world import World
from fusecache.cluster import choice
from fusecache.loader.board import Board
from fusecache.loader.load import Job, ObjectLoad
from fusecache.loader.waiters import Waiter
from fusecache.mount.patience import Patience
from fusecache.peers.breaker import Breakers
from fusecache.peers.member import Member
from fusecache.store.pace import Best, Pace
from fusecache.types import ObjectVersion

EMPTY_HANDED = 10.0
LOOK_EVERY = 1.0
STAND_IN_AFTER = 6.0
STAND_IN_FOR_LOADED = 18.0
AT_RANDOM = 2
LOOKS = 2
"""Per second, at whether others have what is waited for."""
NOTICE = (2.5, 3.5)
"""Seconds after which a dead node is known to be: a connection that is not made (peers.timeout), and a second look."""
OPEN_WAIT = 5.0
LOOK_WHOLE = 0.05
READ = 4 << 20
"""As in exchange.py, membership.py and the option open_wait."""

Flying = Generator[None, tuple[str, Member | None], None]


class Stored:
    """Stands for a file of the store: which blocks are there."""

    def __init__(self, block_count: int, block_size: int) -> None:
        self.block_count = block_count
        self.block_size = block_size
        self.there = bytearray(block_count)
        self.missing = block_count

    @property
    def complete(self) -> bool:
        """See StoredObject."""
        return not self.missing

    def present(self, block: int) -> bool:
        """See StoredObject."""
        return self.there[block] != 0

    def unverified(self, block: int) -> bool:
        """See StoredObject: nothing is left of an earlier run."""
        return False

    def has(self, blocks: range) -> bool:
        """Whether all of these are there."""
        return self.there.find(0, blocks.start, blocks.stop) < 0


@dataclass(eq=False)
class Flight:
    """See exchange.py."""

    job: Job
    load: ObjectLoad
    file: int
    stripe: int
    remote: bool
    demand_only: bool
    at: int
    failed: list[str] = field(default_factory=list)
    may_hedge: Sequence[Member] = ()
    member: Member | None = None
    began: float = 0.0
    stored_only: bool = False
    told: int = 0
    told_at: float = 0.0
    from_stored: bool = False
    stream: Stream | None = None
    turn: int = 0
    """Grows with each thing that is waited for: what comes of an earlier one is not listened to."""

    @property
    def left(self) -> range:
        return range(self.at, self.job.blocks.stop)


class Node:
    """One node of `world`; `nodes` are all of them."""

    def __init__(self, world: World, number: int, nodes: Sequence[Node]) -> None:
        setting = world.setting
        self.world = world
        self.number = number
        self.name = world.views[0][number].name
        self.nodes = nodes
        self.view = 0
        self.dead = False
        self.done_at: float | None = None
        self.loads: dict[int, ObjectLoad] = {}
        self.flights: dict[Flight, Flying] = {}
        self.upstream: dict[tuple[int, int], str] = {}
        self.receiving = 0
        self.server = Server(self)
        self.breakers = Breakers(lambda: world.clock.now)
        # Board and ObjectLoad ask their store for no more than Stored has.
        self.board = Board(max(1, setting.stripe // setting.block), self._begin, abreast=self._abreast)
        self.pace = Pace()
        self.best = Best()
        """Of what other nodes give."""
        reserved = [max(1, setting.concurrency // 4), setting.crew // 4]
        self._free = [
            [max(2, setting.concurrency) - reserved[0], reserved[0]],
            [setting.crew - reserved[1], reserved[1]],
        ]
        """Per kind (0: from the origin, 1: from nodes) the idle threads: those for everything, those for demand."""
        self._working = False
        self._slots = [0, 0]
        self._queues: list[deque[Flight]] = [deque(), deque()]
        """For requests to the origin: of others' stripes, of our own."""
        self._empty: dict[tuple[str, int], float] = {}
        self._reading = 0
        self._opened: float | None = None
        self._patience = Patience(0.0, 0.0)
        self._position = 0

    # -- reading

    def start(self) -> None:
        """A reader opens the first file; the others are fetched after it."""
        self._open()
        self.board.ahead.extend((version, "") for version in self.world.files[1:])
        self.work()

    def _open(self) -> None:
        """See Handles._wait_until_whole."""
        self._opened = self.world.clock.now
        self._patience = Patience(OPEN_WAIT, self._opened)
        self._position = 0
        self._begin(self.world.files[self._reading], "")
        self._look_whole(self._reading)

    def _look_whole(self, file: int) -> None:
        if self.dead or file != self._reading or self._opened is None:
            return
        load, now = self.load(file), self.world.clock.now
        if load.stored.complete:
            self._read_on()
            return
        pace = self.pace.per_second(now)
        left: float | None = None
        if load not in self.board.active or load.stays_partial():
            left = math.inf
        elif pace:
            left = self.board.before(load) / pace
        if self._patience.ends(now, left):
            self._opened = None
            load.being_read = True
            self._read_on()
            self.work()
        else:
            self.world.clock.at(now + LOOK_WHOLE, self._look_whole, file)

    def _read_on(self) -> None:
        """The reader takes what is there, and asks for what comes next."""
        load = self.load(self._reading)
        stored = load.stored
        while not stored.complete:
            stop = min(stored.block_count, self._position + max(1, READ // stored.block_size))
            load.position = stop
            missing = [block for block in range(self._position, stop) if not stored.present(block)]
            if missing:
                now = self.world.clock.now
                waiter = Waiter(
                    load, 0, 0, missing=missing, since=now, deadline=now + 60.0, settled=self._settled
                )
                for block in missing:
                    load.waiting.setdefault(block, []).append(waiter)
                self.board.call_for(load, missing)
                return
            self._position = stop
            if stop == stored.block_count:
                break
        self._reading += 1
        if self._reading < len(self.world.files):
            self._open()
            self.work()
        elif self.done_at is None:
            self.done_at = self.world.clock.now
            if self.number not in self.world.mortal:
                self.world.told_done()

    def _settled(self, _waiter: Waiter) -> None:
        # not at once: the block that has just landed is still being told of
        self.world.clock.at(self.world.clock.now, self._read_again, self._reading)

    def _read_again(self, file: int) -> None:
        if not self.dead and file == self._reading and self._opened is None:
            self._read_on()
            self.work()

    def load(self, file: int) -> ObjectLoad:
        """Of this file, made at the first call."""
        load = self.loads.get(file)
        if load is None:
            version, block = self.world.files[file], self.world.setting.block
            stored = Stored(-(-version.size // block), block)
            load = self.loads[file] = ObjectLoad(version, "", stored)  # type: ignore[arg-type]
            self._follow(load)
        return load

    def _follow(self, load: ObjectLoad) -> None:
        setting, members = self.world.setting, self.world.views[self.view]
        load.follow(
            choice.route_of(
                load.version, setting.block, setting.stripe, members, self.name, owners=self.world.owners
            )
        )

    def _begin(self, version: ObjectVersion, _source: str) -> None:
        load = self.load(self.world.numbers[version.id])
        load.read = True
        self.board.activate(load)

    # -- the crew

    def work(self) -> None:
        """Idle threads take what there is to do."""
        if self._working or self.dead:
            return
        self._working = True
        for remote in (True, False, True):  # what one crew takes or begins may be the turn of the other
            free = self._free[remote]
            while free[0]:
                job = self.board.take(False, self.world.clock.now, remote)
                if job is None:
                    break
                if not isinstance(job, Job):
                    job()
                    continue
                free[0] -= 1
                self._fly(job, remote, False)
            while free[1] and self.board.urgent(remote):
                job = self.board.take(True, self.world.clock.now, remote)
                if not isinstance(job, Job):
                    break
                free[1] -= 1
                self._fly(job, remote, True)
        self._working = False

    def _abreast(self) -> int:
        """See Exchange.abreast."""
        return self.server.paces.abreast(self.best.per_second(self.world.clock.now), self.world.setting.crew)

    def _fly(self, job: Job, remote: bool, demand_only: bool) -> None:
        load, setting = job.load, self.world.setting
        first = job.blocks.start
        stripe = first * setting.block // setting.stripe
        file = self.world.numbers[load.version.id]
        flight = Flight(job, load, file, stripe, remote, demand_only, first)
        flying = self.flights[flight] = self._flying(flight)
        self._advance(flight, flying, None)

    def resume(self, flight: Flight, turn: int, what: str, found: Member | None = None) -> None:
        """What a flight waits for has come: 'all', 'elsewhere', 'miss', 'busy', 'error', or its turn."""
        if turn == flight.turn and flight in self.flights:
            flight.turn += 1
            self._advance(flight, self.flights[flight], (what, found))

    def _advance(self, flight: Flight, flying: Flying, told: tuple[str, Member | None] | None) -> None:
        try:
            if told is None:
                next(flying)
            else:
                flying.send(told)
        except StopIteration:
            self._landed(flight)

    def _landed(self, flight: Flight) -> None:
        """See Loader._done."""
        del self.flights[flight]
        load = flight.load
        self.board.ended(flight.job)
        self._free[flight.remote][flight.demand_only] += 1
        if flight.left:
            self.board.call_for(load, load.give_back(flight.left))
        if load.stored.complete:
            self.board.retire(load)
            if flight.file == self._reading:
                if self._opened is not None:
                    self._look_whole(flight.file)
                else:
                    self._read_on()
        self.work()

    # -- a flight: see Exchange

    def _flying(self, flight: Flight) -> Flying:
        order = self.world.ranking(self.view, flight.file, flight.stripe)
        may_have = lambda member: self._may_have(flight.file, member)  # noqa: E731
        members = len(self.world.views[self.view])
        for turn in choice.turns(order, self.name, flight.failed, self.breakers.allowed, may_have, members):
            if turn.member is None:
                yield from self._from_origin(flight, turn.owner)
                return
            flight.may_hedge = turn.behind
            yield from self._ask(flight, turn.member, turn.stored_only)
            if not flight.left:
                return

    def _may_have(self, file: int, member: Member) -> bool:
        since = self._empty.get((member.name, file))
        return since is None or self.world.clock.now - since > EMPTY_HANDED

    def _ask(self, flight: Flight, member: Member, stored_only: bool) -> Flying:
        counters, clock = self.world.counters, self.world.clock
        asking = choice.Asking(member, member)
        while True:
            target = asking.target
            self._request(flight, target, asking, stored_only)
            what, found = yield
            self._tell(flight)
            self.receiving -= 1
            self.upstream.pop((flight.file, flight.stripe), None)
            if what == "all":
                if self.world.eventful:
                    self.breakers.succeeded(target.name)
                return
            if what == "busy":
                counters.refused += 1
                clock.at(clock.now + 1.0, self.resume, flight, flight.turn, "again")
                yield
                continue
            if what == "elsewhere":
                asking.send_on(found, self.name)
                continue
            if what == "miss":
                counters.missed += 1
                self.breakers.undecided(target.name)
                if stored_only:
                    self._empty[target.name, flight.file] = clock.now
            else:
                counters.errors += 1
                if not asking.sent_on:
                    self.breakers.failed(target.name, what)
            if asking.sent_on:
                asking.back()
                continue
            if not stored_only and member.name not in flight.failed:
                flight.failed.append(member.name)
            return

    def _request(self, flight: Flight, target: Member, asking: choice.Asking, stored_only: bool) -> None:
        clock = self.world.clock
        self.world.counters.requests += 1
        self.receiving += 1
        if not stored_only:
            self.upstream[flight.file, flight.stripe] = target.name
        flight.member, flight.stored_only, flight.stream = target, stored_only, None
        flight.began = flight.told_at = clock.now
        flight.told = flight.at
        request = Request(
            self.number,
            flight,
            flight.turn,
            flight.left,
            stored_only,
            flight.job.urgent,
            asking.direct,
            asking.hops,
            tuple(flight.failed),
            self.server.owed,
            round(self.best.per_second(clock.now) or 0),
        )
        leaves = self.server.attention(self.world.setting.asking)
        server = self.nodes[self.world.index[target.name]].server
        clock.at(leaves + self.world.network.latency, server.connect, request)

    def _from_origin(self, flight: Flight, owner: bool) -> Flying:
        setting, clock = self.world.setting, self.world.clock
        if not owner:
            self.world.counters.fallbacks += 1
        members = len(self.world.views[self.view])
        most = (
            choice.origin_slots(setting.concurrency, members)
            if owner
            else choice.fallback_slots(setting.fallback, members)
        )
        if self._slots[owner] >= most or self._queues[owner]:
            self._queues[owner].append(flight)
            yield
        else:
            self._slots[owner] += 1
        flight.member = None
        stream = Stream(self.world.origin, self.number, len(flight.left), self.arrive)
        stream.ready = stream.count
        flight.stream = stream
        self.world.counters.from_origin += self._bytes(flight, flight.left)
        self.server.incoming[stream] = flight
        clock.at(clock.now + setting.first_byte, self.world.network.offer, stream)
        yield
        self._slots[owner] -= 1
        if self._queues[owner]:
            self._slots[owner] += 1
            following = self._queues[owner].popleft()
            clock.at(clock.now, self.resume, following, following.turn, "turn")

    def _bytes(self, flight: Flight, blocks: range) -> int:
        block, size = self.world.setting.block, flight.load.version.size
        return min(blocks.stop * block, size) - min(blocks.start * block, size)

    def arrive(self, stream: Stream, count: int) -> None:
        """Further blocks of a stream are here."""
        flight = self.server.incoming.get(stream)
        if flight is None or self.dead:
            return
        load, stored = flight.load, flight.load.stored
        there: bytearray = stored.there  # type: ignore[attr-defined]
        first = flight.at
        for block in range(first, first + count):
            if there[block]:
                self.world.counters.twice += stored.block_size
            else:
                there[block] = 1
                stored.missing -= 1  # type: ignore[misc]
            for waiter in load.land(block, None):
                waiter.settled(waiter)
        flight.at += count
        self.pace.add(self.world.clock.now, count * stored.block_size)
        if stream.source != self.world.origin:
            self.best.add(self.world.clock.now, count * stored.block_size)
        self.server.pass_on(flight.file, flight.stripe, load)
        if stream.arrived >= stream.count:
            stream.ended = True
            del self.server.incoming[stream]
            if stream.source != self.world.origin:
                self.nodes[stream.source].server.ended(stream)
            self.resume(flight, flight.turn, "all")

    def comes(self, file: int, stripe: int) -> bool:
        """Whether it is certain that a stripe comes: from its owner to us over nodes that are alive."""
        node = self
        for _ in range(2 * choice.DEPTH):
            name = node.upstream.get((file, stripe))
            if name is None:
                return True
            node = self.nodes[self.world.index[name]]
            if node.dead:
                return False
        return False

    # -- watching each other

    def _tell(self, flight: Flight) -> None:
        """See _Watch.tell."""
        now = self.world.clock.now
        if self.world.eventful and flight.member is not None and now > flight.told_at:
            nbytes = self._bytes(flight, range(flight.told, flight.at))
            self.breakers.measured(
                flight.member.name, nbytes, now - flight.told_at, stored=flight.from_stored
            )
            flight.told, flight.told_at = flight.at, now

    def look(self) -> None:
        """See _Watch.glance: once a second, for all flights."""
        if self.dead or self.done_at is not None:
            return
        now = self.world.clock.now
        self.world.clock.at(now + LOOK_EVERY, self.look)
        idle = self.receiving < self.world.setting.crew // 8
        looks = LOOKS
        for flight in list(self.flights):
            member = flight.member
            if member is None or flight.stored_only or now - flight.began < LOOK_EVERY:
                continue
            self._tell(flight)
            slow = self.breakers.is_slow(member.name)
            if (slow or idle) and looks:
                looks -= 1
                others = [
                    other
                    for other in self.world.views[self.view]
                    if other.name not in (self.name, member.name, *flight.failed)
                ]
                asked = self.world.chance.sample(others, min(len(others), AT_RANDOM))
                if self._hedge(flight, asked, stored_only=True):
                    continue
            loaded = self.server.paces.is_loaded(member.name)
            if slow and now - flight.began > (STAND_IN_FOR_LOADED if loaded else STAND_IN_AFTER):
                self._hedge(
                    flight, [other for other in flight.may_hedge if other is not member], stored_only=False
                )

    def _hedge(self, flight: Flight, asked: Sequence[Member], *, stored_only: bool) -> bool:
        """See Exchange.hedge. The answers are not waited for one by one: who has it begins after a round trip."""
        failed = (
            flight.failed if stored_only else [*flight.failed, flight.member.name if flight.member else ""]
        )
        for member in asked:
            if not self.breakers.allowed(member.name):
                continue
            server = self.nodes[self.world.index[member.name]].server
            server.attention(self.world.setting.answering)
            flight.turn += 1  # the first request is not listened to any more, if this one is answered
            request = Request(
                self.number, flight, flight.turn, flight.left, stored_only, flight.job.urgent, True, 0, tuple(failed),
                self.server.owed, round(self.best.per_second(self.world.clock.now) or 0),
            )  # fmt: skip
            if server.would_give(request):
                self.world.counters.hedged += 1
                self._leave(flight)
                if not stored_only and flight.member is not None:
                    self.breakers.too_slow(flight.member.name)
                flight.member, flight.stored_only = member, True
                flight.began = self.world.clock.now
                server.give(request)
                return True
            flight.turn -= 1
            self.breakers.undecided(member.name)
        return False

    def _leave(self, flight: Flight) -> None:
        """Take no more from whoever sends."""
        stream = flight.stream
        if stream is not None:
            stream.ended = True
            self.server.incoming.pop(stream, None)
            if stream.source != self.world.origin:
                self.nodes[stream.source].server.ended(stream)
            flight.stream = None

    def lose(self, flight: Flight) -> None:
        """Whoever sends has broken off, or is given up."""
        if flight in self.flights:
            self._leave(flight)
            self.resume(flight, flight.turn, "error")

    # -- deaths

    def die(self) -> None:
        """The power fails."""
        self.dead = True
        for flight in list(self.flights):
            self._leave(flight)
        self.flights.clear()
        self.server.die()

    def see(self, view: int) -> None:
        """Other nodes are known to be dead: see Cluster.run."""
        if self.dead:
            return
        self.view = view
        for load in self.loads.values():
            self._follow(load)
            self.board.call_for(load, list(load.waiting))
        for flight in list(self.flights):
            member = flight.member
            if member is not None and self.nodes[self.world.index[member.name]].dead:
                self.lose(flight)
        self.work()
