"""The giving side of a simulated node: see Holdings and PeerServer."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.cluster.simulation_network import Stream
from fusecache.cluster import choice
from fusecache.loader.load import ObjectLoad
from fusecache.loader.waiters import Waiter

if TYPE_CHECKING:
    from benchmarks.cluster.simulation_node import Flight, Node

BACKLOG = 1024
PATIENCE = 5.0
QUEUE = 20.0
"""As in server.py and holdings.py."""


@dataclass(eq=False, slots=True)
class Request:
    """See BlockRequest."""

    client: int
    flight: Flight
    turn: int
    blocks: range
    stored_only: bool
    urgent: bool
    direct: bool
    hops: int
    failed: tuple[str, ...]
    owed: int
    pace: int


class Server:
    """Of one node."""

    def __init__(self, node: Node) -> None:
        self.incoming: dict[Stream, Flight] = {}
        """What comes to this node."""
        self._node = node
        self._world = node.world
        self._busy_until = 0.0
        self._spread = choice.Spread(node.name)
        self._connections = 0
        self._idle: OrderedDict[tuple[int, int], float] = OrderedDict()
        """(client, a number) -> since when, of kept connections."""
        self._idle_of: dict[int, list[int]] = {}
        self._made = 0
        self._backlog: deque[Request] = deque()
        self._waiting = 0
        self.paces = choice.Paces()
        self._streams = 0
        self._given = 0
        self._queue: deque[Request] = deque()
        self._outgoing: dict[Stream, Request] = {}
        self._unready: dict[tuple[int, int], list[Stream]] = {}
        """Streams that wait for blocks of a stripe."""

    def attention(self, seconds: float) -> float:
        """Have the node's one running thread do something that takes so long; returns when it is done."""
        now = self._world.clock.now
        self._busy_until = max(now, self._busy_until) + seconds
        return self._busy_until

    @property
    def owed(self) -> int:
        """Bytes promised to others, and not there yet."""
        block = self._world.setting.block
        return self._given - block * sum(stream.arrived for stream in self._outgoing)

    # -- connections

    def connect(self, request: Request) -> None:
        """A request reaches this node, over a kept connection if there is one."""
        if self._node.dead:
            self._fail(request, self._world.setting.timeout)
            return
        kept = self._idle_of.get(request.client)
        if kept:
            del self._idle[request.client, kept.pop()]
            self._arrive(request)
            return
        clock = self._world.clock
        if self._connections >= self._world.setting.connections and self._idle:
            self._close(next(iter(self._idle)))
        if self._connections < self._world.setting.connections:
            self._connections += 1
            self._world.counters.most_connections = max(
                self._world.counters.most_connections, self._connections
            )
            # the round trip of the handshake
            clock.at(clock.now + 2 * self._world.network.latency, self._arrive, request)
        elif len(self._backlog) < BACKLOG:
            self._backlog.append(request)
        else:
            self._world.counters.not_connected += 1
            self._fail(request, self._world.setting.timeout)

    def _close(self, key: tuple[int, int]) -> None:
        del self._idle[key]
        self._idle_of[key[0]].remove(key[1])
        self._connections -= 1

    def _disconnect(self, client: int) -> None:
        """A request was answered: its connection is kept, or closed for who waits for one."""
        if self._backlog:
            self._arrive(self._backlog.popleft())
            return
        self._made += 1
        self._idle[client, self._made] = self._world.clock.now
        self._idle_of.setdefault(client, []).append(self._made)

    def _fail(self, request: Request, seconds: float) -> None:
        clock = self._world.clock
        client = self._node.nodes[request.client]
        clock.at(clock.now + seconds, client.resume, request.flight, request.turn, "error")

    def _arrive(self, request: Request) -> None:
        counters, clock = self._world.counters, self._world.clock
        waits = max(0.0, self._busy_until - clock.now)
        counters.waited += waits
        number = self._node.number
        counters.waits[number] = max(counters.waits[number], waits)
        self._waiting += 1
        counters.most_waiting = max(counters.most_waiting, self._waiting)
        clock.at(self.attention(self._world.setting.sending_on), self._consider, request)

    # -- what becomes of a request

    def _answer(self, request: Request, what: str, found: object = None) -> None:
        clock = self._world.clock
        client = self._node.nodes[request.client]
        self._disconnect(request.client)
        clock.at(
            clock.now + self._world.network.latency, client.resume, request.flight, request.turn, what, found
        )

    def _withheld(self, request: Request) -> bool:
        """See Holdings._consider."""
        node, flight = self._node, request.flight
        load = node.load(flight.file)
        if load.stored.has(request.blocks):  # type: ignore[attr-defined]
            return False
        if request.stored_only:
            return True
        if node.upstream.get((flight.file, flight.stripe)) == node.nodes[request.client].name:
            return True
        order = self._world.ranking(node.view, flight.file, flight.stripe)
        members = len(self._world.views[node.view])
        if choice.fetches(order, node.name, request.failed, request.hops, members):
            return False
        return load.idle.find(1, request.blocks.start, request.blocks.stop) >= 0

    def _consider(self, request: Request) -> None:
        self._waiting -= 1
        node, flight = self._node, request.flight
        if node.dead:
            self._fail(request, self._world.setting.timeout)
            return
        if flight.turn != request.turn:
            self._disconnect(request.client)  # who asked has found another
            return
        if self._withheld(request):
            self._answer(request, "miss")
            return
        if not request.stored_only:
            asking = node.nodes[request.client].name
            stripe = (flight.load.version.id, flight.stripe)
            self._spread.told(asking, request.owed)
            self.paces.told(asking, request.pace)
            self._spread.told(node.name, self.owed)
            usable = choice.Others(self._world.names(node.view), (asking, *request.failed))
            direct = request.direct or request.hops > 0
            nbytes = len(request.blocks) * self._world.setting.block
            found = self._spread.parent(stripe, asking, usable, nbytes, direct=direct)
            if found != node.name:
                self._world.counters.sent_on += 1
                self._answer(request, "elsewhere", self._world.views[0][self._world.index[found]])
                return
        if self._streams < self._world.setting.streams:
            self.give(request)
        else:
            self._queue.append(request)
            clock = self._world.clock
            clock.at(clock.now + QUEUE, self._refuse, request)

    def _refuse(self, request: Request) -> None:
        if request in self._queue:
            self._queue.remove(request)
            self._answer(request, "busy")

    def would_give(self, request: Request) -> bool:
        """Whether it is not turned down at once."""
        return (
            not self._node.dead
            and not self._withheld(request)
            and self._streams < self._world.setting.streams
        )

    def give(self, request: Request) -> None:
        """Begin to send."""
        if request.flight.turn != request.turn:
            self._disconnect(request.client)
            return
        self._streams += 1
        setting = self._world.setting
        self.attention(setting.answering - setting.sending_on)
        node, client = self._node, self._node.nodes[request.client]
        flight = request.flight
        load = node.load(flight.file)
        stream = Stream(node.number, request.client, len(request.blocks), client.arrive)
        self._given += len(request.blocks) * setting.block
        self._outgoing[stream] = request
        flight.stream = stream
        flight.from_stored = load.stored.has(request.blocks)  # type: ignore[attr-defined]
        client.server.incoming[stream] = flight
        self._refill(stream, load)

    def _refill(self, stream: Stream, load: ObjectLoad) -> None:
        request = self._outgoing[stream]
        there: bytearray = load.stored.there  # type: ignore[attr-defined]
        stop = there.find(0, request.blocks.start + stream.ready, request.blocks.stop)
        stream.ready = (stop if stop >= 0 else request.blocks.stop) - request.blocks.start
        if stop >= 0:
            key = request.flight.file, request.flight.stripe
            self._unready.setdefault(key, []).append(stream)
            if load.idle[stop]:
                self._want(load, stop, request.urgent)
            if self._world.eventful:
                clock = self._world.clock
                clock.at(clock.now + PATIENCE, self._lose_patience, stream, stream.ready)
        self._world.network.offer(stream)

    def _lose_patience(self, stream: Stream, ready: int) -> None:
        """See _Offer._age: we wait as long as it is certain that it comes."""
        request = self._outgoing.get(stream)
        if request is None or stream.ready > ready:
            return
        if self._node.comes(request.flight.file, request.flight.stripe):
            clock = self._world.clock
            clock.at(clock.now + PATIENCE, self._lose_patience, stream, ready)
            return
        self._node.nodes[request.client].lose(request.flight)

    def _want(self, load: ObjectLoad, block: int, urgent: bool) -> None:
        """See Loader.request."""
        size = load.stored.block_size
        now = self._world.clock.now
        waiter = Waiter(
            load,
            block * size,
            size,
            missing=[block],
            since=now,
            deadline=now + 60.0,
            settled=lambda _waiter: None,
            urgent=urgent,
        )
        load.waiting.setdefault(block, []).append(waiter)
        self._node.board.call_for(load, [block])
        self._node.work()

    def pass_on(self, file: int, stripe: int, load: ObjectLoad) -> None:
        """Blocks of this stripe have landed here."""
        for stream in self._unready.pop((file, stripe), ()):
            if not stream.ended:
                self._refill(stream, load)

    def ended(self, stream: Stream) -> None:
        """All of it is sent, or nobody wants it any more."""
        request = self._outgoing.pop(stream, None)
        if request is None:
            return
        stream.ended = True
        self._given -= len(request.blocks) * self._world.setting.block
        self._streams -= 1
        self._disconnect(request.client)
        if self._queue:
            self.give(self._queue.popleft())

    def die(self) -> None:
        """The power fails: who waits for us notices later, by itself."""
        for stream in self._outgoing:
            stream.ended = True
        self._outgoing.clear()
        self._unready.clear()
        self._queue.clear()
        self._backlog.clear()
