"""Nodes of a cluster in one process: stores, fetch services, block sources and servers, over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from fusecache.events import Event, EventHub
from fusecache.fetch.service import FetchService
from fusecache.fetch.settings import FetchSettings
from fusecache.peers.exchange.block_service import BlockService
from fusecache.peers.exchange.block_source import PeerBlockSource
from fusecache.peers.exchange.state import make_exchange_state
from fusecache.peers.member import PROTOCOL, Member, NodeInfo
from fusecache.peers.membership.table import MembershipTable
from fusecache.peers.outgoing import OutgoingBytes
from fusecache.peers.transport.client import PeerClient
from fusecache.peers.transport.server import PeerServer
from fusecache.store.store import Store
from tests.support.content import content
from tests.support.scripted import ScriptedOrigin, version

BLOCK = 16 << 10
STRIPE = 4 * BLOCK
STRIPES = 6
FILE = version("a.safetensors", STRIPES * STRIPE)
DATA = content(FILE.key, FILE.etag, 0, FILE.size)
DEADLINE = 20.0


class Everybody(MembershipTable):
    """A membership in which nobody dies, and whose members are told by the test."""

    def __init__(self) -> None:
        super().__init__(NodeInfo("", "", 1, "", PROTOCOL, "0", 0.0), Event())
        self.found: tuple[Member, ...] = ()

    def members(self) -> tuple[Member, ...]:
        """Those that the test named."""
        return self.found

    def is_alive(self, name: str) -> bool:
        """Everybody is."""
        return True


class Node:
    """One node, of which nothing runs before `serve`."""

    def __init__(self, name: str, folder: Path, everybody: Everybody, origin: ScriptedOrigin) -> None:
        self.name = name
        self.everybody = everybody
        self.client = PeerClient(name)
        self.store = Store(folder / name, limit=1 << 30, free_floor=0, block_size=BLOCK)
        self.outgoing = OutgoingBytes()
        self.state = make_exchange_state(name, everybody, self.outgoing, stripe_bytes=STRIPE)
        self.block_source = PeerBlockSource(
            self.state,
            self.client,
            {"": origin},
            peer_workers=8,
            concurrency=8,
            fallback_requests=8,
        )
        settings = FetchSettings(concurrency=8, range_bytes=STRIPE, deadline=DEADLINE)
        self.fetch_service = FetchService(self.store, self.block_source, settings, events=EventHub())
        self.block_service = BlockService(
            get_node_info=lambda: NodeInfo(name, name, 1, "", PROTOCOL, "0", 0.0),
            state=self.state,
            fetch_service=self.fetch_service,
            store=self.store,
            source_by_identity={origin.identity: ""},
            streams=16,
            render_metrics=str,
        )
        self.url = ""

    async def serve(self, nursery: trio.Nursery) -> None:
        """Answer others; `url` is where."""
        self.fetch_service.start()
        server = PeerServer(self.block_service, "127.0.0.1", 0, connections=32)
        nursery.start_soon(self.block_service.close_idle_fetches)
        port = await nursery.start(server.run)
        self.url = f"http://127.0.0.1:{port}"

    def read(self) -> bytes:
        """All of FILE."""
        object_fetch = self.fetch_service.open_object(FILE, "")
        try:
            return self.fetch_service.read_bytes(object_fetch, 0, FILE.size)
        finally:
            self.fetch_service.release_fetch(object_fetch)

    def close(self) -> None:
        """Let go of everything."""
        self.fetch_service.close()
        self.client.close()
        self.store.close()


@asynccontextmanager
async def running(
    names: Sequence[str], folder: Path, origin: ScriptedOrigin, nursery: trio.Nursery
) -> AsyncIterator[list[Node]]:
    """Nodes of one cluster that serve, and know each other."""
    everybody = Everybody()
    made = [Node(name, folder, everybody, origin) for name in names]
    try:
        for node in made:
            await node.serve(nursery)
        everybody.found = tuple(Member(node.name, node.url, 1 << 30) for node in made)
        yield made
    finally:
        for node in made:
            await trio.to_thread.run_sync(node.close)
