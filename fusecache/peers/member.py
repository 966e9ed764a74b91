"""What a node of a cluster is: pure data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import xxhash

PROTOCOL = 1
"""Version of the exchange's protocol (docs/PROTOCOL.md): nodes of another one are left out."""


def hash_seed(name: str) -> int:
    """What stands for a node in hashes: the same for all nodes that know its name."""
    return xxhash.xxh3_64_intdigest(name.encode())


@dataclass(frozen=True, order=True)
class Member:
    """A node that serves blocks. `name` is unique in its cluster, `url` has a scheme, host and port, `weight` is in
    bytes of cache."""

    name: str
    url: str
    weight: int

    @cached_property
    def seed(self) -> int:
        """Of the hashes that say which stripes are its own."""
        return hash_seed(self.name)


@dataclass(frozen=True)
class NodeInfo:
    """What a node says of itself (GET /v1/health). `instance` is drawn at random at its start, `time` is in seconds
    since the epoch."""

    name: str
    instance: str
    weight: int
    tenant: str
    protocol: int
    version: str
    time: float
