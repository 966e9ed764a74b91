"""The parameters of a simulation, and the state that all its nodes share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.cluster.simulation_network import SimulatedClock, SimulatedNetwork
from fusecache.config.model import MountConfig, Tuning
from fusecache.config.peer_settings import PeerSettings
from fusecache.peers.exchange import policy
from fusecache.peers.member import Member
from fusecache.peers.membership.placement import find_stripe_owners, rank_members, stripe_count
from fusecache.peers.node import PEER_WORKERS
from fusecache.types import ObjectId, ObjectVersion

_TUNING, _PEERS = Tuning(), PeerSettings(node="any")
_OPEN_WAIT: float = MountConfig.model_fields["open_wait"].default
GBIT = 1e9 / 8


@dataclass(frozen=True)
class SimulationSetting:
    """One simulated run. Bytes, seconds, bytes per second."""

    nodes: int
    size: int
    """Bytes of the model that is simulated."""
    shard: int = 5 << 30
    """Bytes of each of its files; the last may be smaller."""
    stripe: int = _PEERS.stripe
    block: int = 1 << 20
    rate: float = 100 * GBIT
    """Bytes per second of each NIC, each way."""
    origin_rate: float = 100 * GBIT
    latency: float = 50e-6
    """Seconds of a packet, one way."""
    first_byte: float = 0.02
    """Seconds until the origin begins to answer."""
    answering_seconds: float = 0.0009
    """Seconds of its one running thread (the GIL) that a node needs to answer a request of another node."""
    redirecting_seconds: float = 0.0006
    """Seconds of that thread to send the caller on to another node."""
    asking_seconds: float = 0.0003
    """Seconds of that thread to send a request."""
    concurrency: int = _TUNING.concurrency
    peer_workers: int = PEER_WORKERS
    fallback: int = _PEERS.fallback
    streams: int = _PEERS.streams
    connections: int = _PEERS.connections
    timeout: float = _PEERS.timeout
    open_wait: float = _OPEN_WAIT
    """Seconds that an open waits for its file to be whole."""
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
    def run_blocks(self) -> int:
        """Blocks that are sent at a time."""
        return max(1, policy.RUN_BYTES // self.block)


@dataclass
class SimulationCounters:
    """Counters of one run, of all nodes together."""

    requests: int = 0
    redirects: int = 0
    misses: int = 0
    errors: int = 0
    refused: int = 0
    fallbacks: int = 0
    hedges: int = 0
    longest_waits: list[float] = field(default_factory=list)
    """Longest wait of a request for its node's attention, per node."""
    waited_seconds: float = 0.0
    """Seconds, summed over the requests."""
    not_connected: int = 0
    most_connections: int = 0
    most_queued: int = 0
    """Requests that waited for one node at the same time."""
    origin_bytes: int = 0
    """Bytes that left the origin."""
    duplicate_bytes: int = 0
    """Bytes that came to a node that had them."""


class SimulatedWorld:
    """The clock, the network, the views of the members, and the owners of stripes, for all nodes. The origin has the
    number behind the last node's."""

    def __init__(self, setting: SimulationSetting) -> None:
        self.setting = setting
        self.clock = SimulatedClock()
        self.rng = random.Random(setting.seed)
        self.counters = SimulationCounters(longest_waits=[0.0] * setting.nodes)
        count = setting.nodes
        self.origin_number = count
        width = len(str(count))
        everybody = [
            Member(f"node-{number:0{width}d}", f"http://n{number}:7070", 1 << 40) for number in range(count)
        ]
        self.number_by_name = {member.name: number for number, member in enumerate(everybody)}
        drawn = self.rng.sample(range(count), round(count * setting.slow) + round(count * setting.dead))
        self.slow_nodes = frozenset(drawn[: round(count * setting.slow)])
        self.dying_nodes = frozenset(drawn[round(count * setting.slow) :])
        rates = [setting.rate * (setting.slow_rate if at in self.slow_nodes else 1) for at in range(count)]
        up = [*rates, setting.origin_rate]
        self.network = SimulatedNetwork(
            self.clock, up, up, setting.latency, setting.block, setting.run_blocks
        )
        self.member_views: list[tuple[Member, ...]] = [tuple(everybody)]
        """The members that are alive: at first, and after the deaths."""
        self.files = [
            ObjectVersion("s3://models", f"model-{number:05d}.safetensors", "v1", size, 0)
            for number, size in enumerate(_file_sizes(setting))
        ]
        self.file_number_by_id = {version.id: number for number, version in enumerate(self.files)}
        self.unfinished_nodes = count - len(self.dying_nodes)
        """Nodes that don't die and don't have everything yet; at 0 the clock stops."""
        self._owners: dict[tuple[ObjectId, int, int], Sequence[int]] = {}
        self._rankings: dict[tuple[int, int, int], list[Member]] = {}
        self._live_names: dict[int, frozenset[str]] = {}

    @property
    def has_faults(self) -> bool:
        """Whether nodes have to watch each other."""
        return bool(self.slow_nodes or self.dying_nodes)

    def stripe_owners(self, object_id: ObjectId, stripes: int, members: Sequence[Member]) -> Sequence[int]:
        """The owners of so many stripes of an object, as find_stripe_owners has them: worked out once, and not by every
        node."""
        key = object_id, stripes, len(members)
        if key not in self._owners:
            self._owners[key] = find_stripe_owners(object_id, stripes, members)
        return self._owners[key]

    def ranking_of(self, view: int, file: int, stripe: int) -> list[Member]:
        """The ranking of a stripe in a view of the members: worked out once, and not by every node."""
        key = view, file, stripe
        found = self._rankings.get(key)
        if found is None:
            members = self.member_views[view]
            found = rank_members(self.files[file].id, stripe, members, policy.ranking_length(len(members)))
            self._rankings[key] = found
        return found

    def live_names(self, view: int) -> frozenset[str]:
        """The names of the members in this view."""
        if view not in self._live_names:
            self._live_names[view] = frozenset(member.name for member in self.member_views[view])
        return self._live_names[view]

    def stripes_of(self, file: int) -> int:
        """How many stripes this file has."""
        return stripe_count(self.files[file].size, self.setting.stripe)

    def node_finished(self) -> None:
        """A node that does not die has everything."""
        self.unfinished_nodes -= 1
        if not self.unfinished_nodes:
            self.clock.is_stopped = True


def _file_sizes(setting: SimulationSetting) -> list[int]:
    whole, rest = divmod(setting.size, setting.shard)
    return [setting.shard] * whole + ([rest] if rest else [])
