"""What is simulated: its parameters, and what all its nodes share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.cluster.simulation_network import Clock, Network
from fusecache.cluster import choice
from fusecache.cluster.cluster import CREW
from fusecache.config.model import Tuning
from fusecache.config.peers import PeerSettings
from fusecache.peers.member import Member
from fusecache.peers.placement import owners, ranking, stripe_count
from fusecache.types import ObjectId, ObjectVersion

_TUNING, _PEERS = Tuning(), PeerSettings(node="any")
GBIT = 1e9 / 8


@dataclass(frozen=True)
class Setting:
    """One simulated run. Bytes, seconds, bytes per second."""

    nodes: int
    size: int
    """Of the model that is simulated."""
    shard: int = 5 << 30
    """Of each of its files; the last may be smaller."""
    stripe: int = _PEERS.stripe
    block: int = 1 << 20
    rate: float = 100 * GBIT
    """Of each NIC, each way."""
    origin_rate: float = 100 * GBIT
    latency: float = 50e-6
    """Of a packet, one way."""
    first_byte: float = 0.02
    """Of the origin, until it begins to answer."""
    answering: float = 0.0009
    """Seconds of its one thread at a time (the GIL) that a node needs for a request of another node."""
    sending_on: float = 0.0006
    """The same, when it sends the caller on to another node."""
    asking: float = 0.0003
    """The same, of who asks."""
    concurrency: int = _TUNING.concurrency
    crew: int = CREW
    fallback: int = _PEERS.fallback
    streams: int = _PEERS.streams
    connections: int = _PEERS.connections
    timeout: float = _PEERS.timeout
    slow: float = 0.0
    """Share of the nodes whose NIC has only `slow_rate` of the others' rate."""
    slow_rate: float = 0.1
    dead: float = 0.0
    """Share of the nodes that lose their power after half the time that the model takes through one link."""
    seed: int = 1

    @property
    def bound(self) -> float:
        """Seconds that the simulated model takes through one link, or leaves the origin in."""
        return self.size / min(self.rate, self.origin_rate)

    @property
    def run(self) -> int:
        """Blocks that are sent at a time."""
        return max(1, (2 << 20) // self.block)


@dataclass
class Counters:
    """What happened in one run, of all nodes together."""

    requests: int = 0
    sent_on: int = 0
    missed: int = 0
    errors: int = 0
    refused: int = 0
    fallbacks: int = 0
    hedged: int = 0
    waits: list[float] = field(default_factory=list)
    """Longest wait of a request for its node's attention, per node."""
    waited: float = 0.0
    """Seconds, summed over the requests."""
    not_connected: int = 0
    most_connections: int = 0
    most_waiting: int = 0
    """Requests that waited for one node at the same time."""
    from_origin: int = 0
    """Bytes."""
    twice: int = 0
    """Bytes that came to a node that had them."""


class World:
    """The clock, the network, who is alive, and where stripes are, for all nodes. Node `nodes` is the origin."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.clock = Clock()
        self.chance = random.Random(setting.seed)
        self.counters = Counters(waits=[0.0] * setting.nodes)
        count = setting.nodes
        self.origin = count
        width = len(str(count))
        everybody = [
            Member(f"node-{number:0{width}d}", f"http://n{number}:7070", 1 << 40) for number in range(count)
        ]
        self.index = {member.name: number for number, member in enumerate(everybody)}
        drawn = self.chance.sample(range(count), round(count * setting.slow) + round(count * setting.dead))
        self.slow = frozenset(drawn[: round(count * setting.slow)])
        self.mortal = frozenset(drawn[round(count * setting.slow) :])
        rates = [setting.rate * (setting.slow_rate if at in self.slow else 1) for at in range(count)]
        up = [*rates, setting.origin_rate]
        self.network = Network(self.clock, up, up, setting.latency, setting.block, setting.run)
        self.views: list[tuple[Member, ...]] = [tuple(everybody)]
        """Who is alive: at first, and after the deaths."""
        self.files = [
            ObjectVersion("s3://models", f"model-{number:05d}.safetensors", "v1", size, 0)
            for number, size in enumerate(_sizes(setting))
        ]
        self.numbers = {version.id: number for number, version in enumerate(self.files)}
        self.left = count - len(self.mortal)
        """Nodes that don't die and don't have everything yet."""
        self._owners: dict[tuple[ObjectId, int, int], Sequence[int]] = {}
        self._rankings: dict[tuple[int, int, int], list[Member]] = {}
        self._names: dict[int, frozenset[str]] = {}

    @property
    def eventful(self) -> bool:
        """Whether nodes have to watch each other."""
        return bool(self.slow or self.mortal)

    def owners(self, object_id: ObjectId, stripes: int, members: Sequence[Member]) -> Sequence[int]:
        """See placement.owners: worked out once, and not by every node."""
        key = object_id, stripes, len(members)
        if key not in self._owners:
            self._owners[key] = owners(object_id, stripes, members)
        return self._owners[key]

    def ranking(self, view: int, file: int, stripe: int) -> list[Member]:
        """See placement.ranking: the same."""
        key = view, file, stripe
        found = self._rankings.get(key)
        if found is None:
            members = self.views[view]
            found = ranking(self.files[file].id, stripe, members, choice.ranked(len(members)))
            self._rankings[key] = found
        return found

    def names(self, view: int) -> frozenset[str]:
        """Of those alive."""
        if view not in self._names:
            self._names[view] = frozenset(member.name for member in self.views[view])
        return self._names[view]

    def stripes(self, file: int) -> int:
        """Of this file."""
        return stripe_count(self.files[file].size, self.setting.stripe)

    def told_done(self) -> None:
        """A node that does not die has everything."""
        self.left -= 1
        if not self.left:
            self.clock.stopped = True


def _sizes(setting: Setting) -> list[int]:
    whole, rest = divmod(setting.size, setting.shard)
    return [setting.shard] * whole + ([rest] if rest else [])
