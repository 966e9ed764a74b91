"""One simulated run: all nodes begin to read everything at the same moment, with empty caches.

The project's own code runs wherever it does no I/O: placement, the rules and timings of policy.py,
StripeRequest, CircuitBreaker, Hedger, FetchScheduler and ObjectFetch. The rest is simulated: the network
(simulation_network.py), threads and a reader (simulation_node.py), and what stands for sockets on the receiving
(simulation_client.py) and the sending side (simulation_server.py, simulation_connections.py). Not simulated: the time
that copying, hashing and writing bytes takes, lost packets, deadlines, and the probes of the membership.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.cluster.simulation_node import SimulatedNode
from benchmarks.cluster.simulation_peer import SimulatedPeer
from benchmarks.cluster.simulation_server import SimulatedServer
from benchmarks.cluster.simulation_world import SimulatedWorld, SimulationSetting
from fusecache.peers.exchange import policy

_START_WITHIN = 1e-3
"""Seconds within which all nodes begin."""
_MAX_OVER_BOUND = 50.0
"""Times the bound, and as many seconds, after which a run is given up."""
_SECOND_LOOK_TAKES = (0.5, 1.5)
"""Seconds from a connection to a dead node that is not made until the membership has probed the node once more."""


@dataclass(frozen=True)
class SimulationOutcome:
    """The outcome of a run. Times in simulated seconds; `None`: not all of these nodes got everything."""

    setting: SimulationSetting
    last_done_at: float | None
    """When the last node that neither is slow nor died had everything."""
    median_done_at: float
    last_slow_done_at: float | None
    """When the last slow node had everything."""
    origin_copies: float
    """Copies of the model that left the origin."""
    busiest_copies: float
    """Copies of the model that the node that sent most sent."""
    requests_per_stripe: float
    """Requests to other nodes, per node and stripe."""
    redirects_per_stripe: float
    """How many of them were sent on to another holder."""
    mean_wait: float
    """Seconds until a node's thread turned to a request: the mean."""
    longest_wait: float
    most_waiting: int
    most_connections: int
    not_connected: int
    refused: int
    errors: int
    fallbacks: int
    hedged: int
    duplicate_copies: float
    """Copies of the model that came to nodes which had those bytes, per node."""
    events: int

    @property
    def over_bound(self) -> float:
        """`last_done_at` over the time that the model takes through one link."""
        return float("nan") if self.last_done_at is None else self.last_done_at / self.setting.bound

    def as_json(self) -> dict[str, Any]:
        """The outcome as it is written into the results."""
        return {**asdict(self), "bound": self.setting.bound, "over_bound": self.over_bound}


def run_simulation(setting: SimulationSetting) -> SimulationOutcome:
    """Run one simulation to its end; the same setting gives the same outcome."""
    world = SimulatedWorld(setting)
    peers = [SimulatedPeer(world, number) for number in range(setting.nodes)]
    servers: list[SimulatedServer] = []
    nodes = [SimulatedNode(peer, peers, servers) for peer in peers]
    servers += [node.server for node in nodes]
    clock, chance = world.clock, world.rng
    for node in nodes:
        clock.call_at(chance.uniform(0, _START_WITHIN), node.start_reading)
        clock.call_at(policy.HEDGE_EVERY * chance.uniform(1, 2), node.poll_transfers)
    if world.dying_nodes:
        when = setting.bound / 2
        world.member_views.append(
            tuple(member for at, member in enumerate(world.member_views[0]) if at not in world.dying_nodes)
        )
        for at in sorted(world.dying_nodes):
            clock.call_at(when, nodes[at].lose_power)
        for node in nodes:
            noticed = when + setting.timeout + chance.uniform(*_SECOND_LOOK_TAKES)
            clock.call_at(noticed, node.notice_deaths, 1)
    collecting = gc.isenabled()
    gc.disable()  # there are millions of objects, and hardly any garbage in circles
    try:
        clock.run_until_stopped(_MAX_OVER_BOUND * (setting.bound + 1))
    finally:
        if collecting:
            gc.enable()
    return _summarize_run(world, nodes)


def _summarize_run(world: SimulatedWorld, nodes: list[SimulatedNode]) -> SimulationOutcome:
    setting, counters, network = world.setting, world.counters, world.network
    other = world.slow_nodes | world.dying_nodes
    healthy = [node.done_at for number, node in enumerate(nodes) if number not in other]
    slow = [nodes[at].done_at for at in world.slow_nodes]
    done = [at for at in healthy if at is not None]
    stripes = sum(world.stripes_of(file) for file in range(len(world.files)))
    each = setting.nodes * stripes
    return SimulationOutcome(
        setting,
        last_done_at=max(done) if len(done) == len(healthy) else None,
        median_done_at=statistics.median(done) if done else float("nan"),
        last_slow_done_at=max((at for at in slow if at is not None), default=None)
        if None not in slow
        else None,
        origin_copies=counters.origin_bytes / setting.size,
        busiest_copies=max(network.bytes_up[:-1]) / setting.size,
        requests_per_stripe=counters.requests / each,
        redirects_per_stripe=counters.redirects / each,
        mean_wait=counters.waited_seconds / max(1, counters.requests),
        longest_wait=max(counters.longest_waits),
        most_waiting=counters.most_queued,
        most_connections=counters.most_connections,
        not_connected=counters.not_connected,
        refused=counters.refused,
        errors=counters.errors,
        fallbacks=counters.fallbacks,
        hedged=counters.hedges,
        duplicate_copies=counters.duplicate_bytes / setting.size / setting.nodes,
        events=world.clock.event_count,
    )
