"""One simulated run: all nodes begin to read everything at the same moment, with empty caches.

What runs is the project's own code wherever it does no I/O: placement, the rules of choice.py, breakers, Board and
ObjectLoad. What is simulated is the rest: the network (simulation_network.py), what stands for threads
(simulation_node.py) and for the server (simulation_server.py). Not simulated: the time that copying, hashing and
writing bytes takes, lost packets, and the probes of the membership.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.cluster.simulation_node import LOOK_EVERY, NOTICE, Node
from benchmarks.cluster.simulation_world import Setting, World

_START = 1e-3
"""Seconds within which all nodes begin."""
_LIMIT = 50.0
"""Times the bound, and as many seconds, after which a run is given up."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run. Times in seconds; `None`: not all healthy nodes got everything."""

    setting: Setting
    last: float | None
    """Until the last node that neither is slow nor died had everything."""
    median: float
    last_slow: float | None
    """The same of the slow nodes."""
    origin: float
    """Copies of the model that left the origin."""
    busiest: float
    """Copies of the model that the node that sent most sent."""
    requests: float
    """Per node and stripe."""
    sent_on: float
    """Of those, how many were sent on to another holder."""
    wait: float
    """Until a node turned to a request: the mean."""
    longest_wait: float
    most_waiting: int
    most_connections: int
    not_connected: int
    refused: int
    errors: int
    fallbacks: int
    hedged: int
    twice: float
    """Copies of the model that came to nodes which had those bytes, per node."""
    events: int

    @property
    def over_bound(self) -> float:
        """`last` over the time that the model takes through one link."""
        return float("nan") if self.last is None else self.last / self.setting.bound

    def plain(self) -> dict[str, Any]:
        """As it is written."""
        return {**asdict(self), "bound": self.setting.bound, "over_bound": self.over_bound}


def simulate(setting: Setting) -> Outcome:
    """Run it; the same setting gives the same outcome."""
    world = World(setting)
    nodes: list[Node] = []
    nodes += [Node(world, number, nodes) for number in range(setting.nodes)]
    clock, chance = world.clock, world.chance
    for node in nodes:
        clock.at(chance.uniform(0, _START), node.start)
        clock.at(LOOK_EVERY * chance.uniform(1, 2), node.look)
    if world.mortal:
        when = setting.bound / 2
        world.views.append(
            tuple(member for at, member in enumerate(world.views[0]) if at not in world.mortal)
        )
        for at in sorted(world.mortal):
            clock.at(when, nodes[at].die)
        for node in nodes:
            clock.at(when + chance.uniform(*NOTICE), node.see, 1)
    collecting = gc.isenabled()
    gc.disable()  # there are millions of objects, and none of them is garbage for long
    try:
        clock.run(_LIMIT * (setting.bound + 1))
    finally:
        if collecting:
            gc.enable()
    return _outcome(world, nodes)


def _outcome(world: World, nodes: list[Node]) -> Outcome:
    setting, counters, network = world.setting, world.counters, world.network
    healthy = [node.done_at for node in nodes if node.number not in world.slow | world.mortal]
    slow = [nodes[at].done_at for at in world.slow]
    done = [at for at in healthy if at is not None]
    stripes = sum(world.stripes(file) for file in range(len(world.files)))
    each = setting.nodes * stripes
    return Outcome(
        setting,
        last=max(done) if len(done) == len(healthy) else None,
        median=statistics.median(done) if done else float("nan"),
        last_slow=max((at for at in slow if at is not None), default=None) if None not in slow else None,
        origin=counters.from_origin / setting.size,
        busiest=max(network.bytes_up[:-1]) / setting.size,
        requests=counters.requests / each,
        sent_on=counters.sent_on / each,
        wait=counters.waited / max(1, counters.requests),
        longest_wait=max(counters.waits),
        most_waiting=counters.most_waiting,
        most_connections=counters.most_connections,
        not_connected=counters.not_connected,
        refused=counters.refused,
        errors=counters.errors,
        fallbacks=counters.fallbacks,
        hedged=counters.hedged,
        twice=counters.twice / setting.size / setting.nodes,
        events=world.clock.events,
    )
