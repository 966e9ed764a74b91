"""The connections to a simulated node: how many there are, which are idle, and the requests that wait for one."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

from benchmarks.cluster.simulation_peer import SimulatedRequest
from benchmarks.cluster.simulation_world import SimulatedWorld
from fusecache.peers.transport.server import ACCEPT_BACKLOG


class SimulatedConnections:
    """At most `connections` at a time, of all clients together.

    | A connection | Event | Next |
    |---|---|---|
    | is none | a request finds room, or an idle connection that makes room | in use, after a round trip |
    | in use | its request was answered, and another waits for a connection | in use by that one |
    | in use | its request was answered, and none waits | idle |
    | idle | its client sends a request | in use |
    | idle | another client needs the room | is none |
    """

    def __init__(
        self,
        world: SimulatedWorld,
        on_connected: Callable[[SimulatedRequest], None],
        on_refused: Callable[[SimulatedRequest], None],
    ) -> None:
        self._world = world
        self._on_connected = on_connected
        self._on_refused = on_refused
        self._count = 0
        self._idle_since: OrderedDict[tuple[int, int], float] = OrderedDict()
        """(client, a number) -> since when it is idle; the longest first."""
        self._idle_by_client: dict[int, list[int]] = {}
        self._kept_count = 0
        self._backlog: deque[SimulatedRequest] = deque()

    def connect(self, request: SimulatedRequest) -> None:
        """A request reaches the node: it is connected at once over an idle connection, later over a new one, or
        refused."""
        client, clock = request.client.number, self._world.clock
        kept = self._idle_by_client.get(client)
        if kept:
            del self._idle_since[client, kept.pop()]
            self._on_connected(request)
            return
        if self._count >= self._world.setting.connections and self._idle_since:
            self._close_idle(next(iter(self._idle_since)))
        if self._count < self._world.setting.connections:
            self._count += 1
            counters = self._world.counters
            counters.most_connections = max(counters.most_connections, self._count)
            # the round trip of the handshake
            clock.call_at(clock.now + 2 * self._world.network.latency, self._on_connected, request)
        elif len(self._backlog) < ACCEPT_BACKLOG:
            self._backlog.append(request)
        else:
            self._world.counters.not_connected += 1
            self._on_refused(request)

    def _close_idle(self, key: tuple[int, int]) -> None:
        del self._idle_since[key]
        self._idle_by_client[key[0]].remove(key[1])
        self._count -= 1

    def release(self, client: int) -> None:
        """A request of this client was answered."""
        if self._backlog:
            self._on_connected(self._backlog.popleft())
            return
        self._kept_count += 1
        self._idle_since[client, self._kept_count] = self._world.clock.now
        self._idle_by_client.setdefault(client, []).append(self._kept_count)

    def lose_power(self) -> None:
        """The power fails: nobody is accepted any more."""
        self._backlog.clear()
