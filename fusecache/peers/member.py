"""A node of a cluster, and how it introduces itself to the others. Pure: no I/O."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property

import xxhash

from fusecache.peers.errors import PeerError
from fusecache.types import NODE_NAME_PATTERN

PROTOCOL = 2
"""Version of the protocol between nodes (docs/PROTOCOL.md): nodes that speak another one are left out."""


def hash_seed(name: str) -> int:
    """The number that stands for a node in hashes, the same in all nodes that know its name."""
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
        """Seed of the hashes that say which stripes this node owns."""
        return hash_seed(self.name)


@dataclass(frozen=True)
class NodeInfo:
    """A node's introduction (GET /v1/health). `instance` is drawn at random at its start, `time` is in seconds
    since the epoch."""

    name: str
    instance: str
    weight: int
    tenant: str
    protocol: int
    version: str
    time: float


def pack_node_info(node_info: NodeInfo) -> bytes:
    """A node's introduction as a line of JSON."""
    return json.dumps({**vars(node_info)}, separators=(",", ":")).encode() + b"\n"


def unpack_node_info(body: bytes) -> NodeInfo:
    """The introduction in a body. Raises PeerError when no node, of whatever protocol, can have sent it."""
    try:
        found = json.loads(body)
        info = NodeInfo(**{name: found[name] for name in NodeInfo.__dataclass_fields__})
    except (ValueError, TypeError, KeyError, RecursionError):
        raise PeerError("what answers is not a node of a cluster") from None
    texts = (info.name, info.instance, info.tenant, info.version)
    if not all(isinstance(text, str) and len(text) <= 64 and text.isprintable() for text in texts):
        raise PeerError("the node's names can't be read")
    if not NODE_NAME_PATTERN.fullmatch(info.name) or not (
        info.tenant == "" or NODE_NAME_PATTERN.fullmatch(info.tenant)
    ):
        raise PeerError("the node's name or tenant is not a name")
    if type(info.weight) is not int or not 1 <= info.weight <= 1 << 60:
        raise PeerError(f"{info.name}: its weight can't be")
    if type(info.protocol) is not int or isinstance(info.time, bool):
        raise PeerError(f"{info.name}: its protocol can't be read")
    if not isinstance(info.time, int | float):
        raise PeerError(f"{info.name}: its time can't be read")
    return info
