"""The exchange's client side, with nodes that a test makes silent."""

from __future__ import annotations

import time
from typing import Any

import pytest
import xxhash

from fusecache.events import Event
from fusecache.peers.errors import PeerConnectTimeoutError
from fusecache.peers.exchange.block_source import PeerBlockSource
from fusecache.peers.exchange.state import ExchangeState, make_exchange_state
from fusecache.peers.member import PROTOCOL, Member, NodeInfo
from fusecache.peers.membership.table import MembershipTable
from fusecache.peers.outgoing import OutgoingBytes
from fusecache.peers.transport.client import PeerClient
from fusecache.peers.transport.observer import BlockReceiver, TransferObserver
from fusecache.peers.transport.wire import BlockRequest
from tests.support.content import content
from tests.support.scripted import ScriptedOrigin, version

BLOCK = 4096
FILE = version("a.safetensors", BLOCK)
DATA = content(FILE.key, FILE.etag, 0, BLOCK)


class Everybody(MembershipTable):
    """Two members, of which the test says which one is alive."""

    def __init__(self) -> None:
        super().__init__(NodeInfo("me", "", 1, "", PROTOCOL, "0", 0.0), Event())
        self.alive = {"a", "me"}
        self.suspects: list[str] = []
        self.suspected.subscribe(self.suspects.append)

    def members(self) -> tuple[Member, ...]:
        return tuple(Member(name, f"http://{name}:1", 1 << 30) for name in ("a", "me"))

    def is_alive(self, name: str) -> bool:
        return name in self.alive


class ScriptedBlocks:
    all_stored = True

    def receive_into(self, receiver: BlockReceiver) -> None:
        receiver.begin_block(xxhash.xxh3_64_intdigest(DATA))
        receiver.write(memoryview(DATA))
        assert receiver.end_block()

    def close(self) -> None:
        pass


class VerifyingSink:
    """Keeps the bytes of one block, if they have the checksum that was announced."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.checksum: int | None = None

    def begin_block(self, checksum: int | None) -> None:
        self.checksum = checksum

    def write(self, view: memoryview) -> None:
        self.data += view

    def end_block(self) -> bool:
        return self.checksum in (None, xxhash.xxh3_64_intdigest(self.data))

    def restart_block(self) -> None:
        self.data.clear()


class UnreachableClient(PeerClient):
    """Connections to it come about after so many tries."""

    def __init__(self, tries: int) -> None:
        super().__init__("me")
        self.tries_left = tries

    def request_blocks(
        self, url: str, request: BlockRequest, object_size: int, observer: TransferObserver
    ) -> Any:
        self.tries_left -= 1
        if self.tries_left > 0:
            raise PeerConnectTimeoutError(f"{url}: no connection within 2 s")
        return ScriptedBlocks()


def supplied(
    client: UnreachableClient, members: Everybody, origin: ScriptedOrigin
) -> tuple[bytes, ExchangeState]:
    state = make_exchange_state("me", members, OutgoingBytes(), stripe_bytes=BLOCK)
    exchange = PeerBlockSource(
        state, client, {"": origin}, peer_workers=1, concurrency=1, fallback_requests=1
    )
    assert state.rankings.ranking_of(FILE.id, 0)[0].name == "a", "choose another key"
    sink = VerifyingSink()
    exchange.send_blocks(
        FILE, "", range(1), BLOCK, sink, deadline=time.monotonic() + 20, cancelled=lambda: False, urgent=True
    )
    return bytes(sink.data), state


@pytest.fixture
def origin() -> ScriptedOrigin:
    return ScriptedOrigin([FILE], chunk=BLOCK)


def test_a_node_whose_connection_is_lost_once_is_asked_again(origin: ScriptedOrigin) -> None:
    members = Everybody()
    data, state = supplied(UnreachableClient(2), members, origin)
    assert data == DATA
    assert (state.traffic.stats.fallbacks, origin.reads) == (0, [])
    assert members.suspects == ["a"]
    assert state.traffic.node_counters("a").errors == 0


@pytest.mark.parametrize("alive", [True, False])
def test_a_node_that_stays_silent_or_is_gone_is_passed_over(origin: ScriptedOrigin, alive: bool) -> None:
    members, client = Everybody(), UnreachableClient(9)
    if not alive:
        members.alive.remove("a")
    data, state = supplied(client, members, origin)
    assert data == DATA
    assert state.traffic.stats.fallbacks == 1
    assert 9 - client.tries_left == (2 if alive else 1)
    assert state.traffic.node_counters("a").errors == 1
