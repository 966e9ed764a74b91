"""Nodes of a cluster in one process: stores, loaders, exchanges and servers, over real sockets, without mounts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from fusecache.cluster.exchange import Exchange
from fusecache.cluster.holdings import Holdings
from fusecache.loader.interface import LoaderSettings
from fusecache.loader.loader import Loader
from fusecache.peers.client import PeerClient
from fusecache.peers.member import PROTOCOL, Health, Member
from fusecache.peers.server import PeerServer
from fusecache.store.store import Store
from fusecache.types import ObjectVersion
from tests.support.content import content
from tests.support.scripted import ScriptedOrigin, version

BLOCK = 16 << 10
STRIPE = 4 * BLOCK
STRIPES = 6
FILE = version("a.safetensors", STRIPES * STRIPE)
DATA = content(FILE.key, FILE.etag, 0, FILE.size)
DEADLINE = 20.0


class Everybody:
    """A membership in which nobody dies."""

    def __init__(self) -> None:
        self.found: tuple[Member, ...] = ()

    def members(self) -> tuple[Member, ...]:
        """See Members."""
        return self.found

    def is_alive(self, name: str) -> bool:
        """See Members."""
        return True

    def heard(self, name: str) -> None:
        """See Members."""

    def suspect(self, name: str) -> None:
        """See Members."""


class Library:
    """Of a catalog that has one file."""

    def siblings(self, version: ObjectVersion) -> Sequence[ObjectVersion]:
        """See Library."""
        return [version]

    def completed(self, version: ObjectVersion) -> None:
        """See Library."""

    def gone(self, version: ObjectVersion) -> None:
        """See Library."""


class Node:
    """One node, of which nothing runs before `serve`."""

    def __init__(self, name: str, folder: Path, everybody: Everybody, origin: ScriptedOrigin) -> None:
        self.name = name
        self.everybody = everybody
        self.client = PeerClient(name)
        self.store = Store(folder / name, limit=1 << 30, free_floor=0, block_size=BLOCK)
        self.exchange = Exchange(
            name, everybody, self.client, {"": origin}, stripe=STRIPE, crew=8, concurrency=8, fallback=8
        )
        settings = LoaderSettings(concurrency=8, range_bytes=STRIPE, deadline=DEADLINE)
        self.loader = Loader(self.store, {"": origin}, Library(), settings, self.exchange)
        self.holdings = Holdings(
            lambda: Health(name, name, 1, "", PROTOCOL, "0", 0.0), everybody, self.exchange, self.loader, self.store,
            {origin.identity: ""}, streams=16, metrics=str,
        )  # fmt: skip
        self.url = ""

    async def serve(self, nursery: trio.Nursery) -> None:
        """Answer others; `url` is where."""
        self.loader.start()
        server = PeerServer(self.holdings, "127.0.0.1", 0, connections=32)
        nursery.start_soon(self.holdings.run)
        await nursery.start(server.run)
        self.url = f"http://127.0.0.1:{server.port}"

    def read(self) -> bytes:
        """All of FILE."""
        load = self.loader.open(FILE, "")
        try:
            return self.loader.read(load, 0, FILE.size)
        finally:
            self.loader.release(load)

    def close(self) -> None:
        """Let go of everything."""
        self.loader.close()
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
