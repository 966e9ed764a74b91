"""Both ends of the protocol between nodes over real sockets, with a node that is made up."""

from __future__ import annotations

import functools
import os
import random
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import xxhash

from fusecache.config.peer_settings import PeerSettings
from fusecache.errors import UnavailableError
from fusecache.peers.errors import (
    PeerBusyError,
    PeerError,
    PeerMissError,
    PeerRedirectError,
    PeerRefusedError,
    PeerVersionGoneError,
)
from fusecache.peers.member import PROTOCOL, NodeInfo
from fusecache.peers.membership.http_probe import HttpProbe
from fusecache.peers.transport.auth import RequestSigner, RequestVerifier
from fusecache.peers.transport.client import PeerClient
from fusecache.peers.transport.credentials import load_credentials
from fusecache.peers.transport.observer import RequestTimeout
from fusecache.peers.transport.server import PeerServer, Piece
from fusecache.peers.transport.wire import BlockRequest, RequestError
from fusecache.types import ObjectVersion
from tests.support.receivers import CheckedBlocks

BLOCK = 300_000
SIZE = 2 * BLOCK + 1234
VERSION = ObjectVersion("s3://b", "k", "e", SIZE, 1)
DATA = random.Random(5).randbytes(SIZE)
SECRET = "sixteen letters at least"
DEADLINE = 20


def piece_of(block: int, fd: int) -> Piece:
    data = DATA[block * BLOCK : (block + 1) * BLOCK]
    checksum = xxhash.xxh3_64_intdigest(data)
    if fd < 0:
        return Piece(block, checksum, len(data), data=data)
    return Piece(block, checksum, len(data), fd, block * BLOCK)


class FakeBlockResponse:
    all_stored = True

    def __init__(self, node: FakeRequestHandler, blocks: range) -> None:
        self.block_lengths = [len(DATA[block * BLOCK : (block + 1) * BLOCK]) for block in blocks]
        self._node = node
        self._left = list(blocks)

    async def next_pieces(self) -> list[Piece] | float:
        if self._node.ages:
            return self._node.ages.pop(0)
        block = self._left.pop(0)
        await self._node.before(block)
        return [piece_of(block, self._node.fd if block != 1 else -1)]

    def close(self) -> None:
        self._node.closed += 1


class FakeRequestHandler:
    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.closed = 0
        self.refusal: RequestError | None = None
        self.asked: list[BlockRequest] = []
        self.bytes_sent = 0
        self.profiles: dict[str, bytes] = {}
        self.profile_requests: list[tuple[str, str, bool]] = []
        self.ages: list[float] = []
        self.before: Callable[[int], Any] = self._at_once

    async def _at_once(self, block: int) -> None:
        await trio.lowlevel.checkpoint()

    def node_info(self) -> NodeInfo:
        return NodeInfo("fake", "1", 1, "", PROTOCOL, "0", 0.0)

    def coverage(self) -> list[dict[str, Any]]:
        return [{"id": VERSION.id}]

    def metrics_page(self) -> str:
        return "up 1\n"

    def load_profile(self, name: str, caller: str, caller_has_profile: bool) -> bytes | None:
        self.profile_requests.append((name, caller, caller_has_profile))
        return self.profiles.get(name)

    async def begin_response(self, request: BlockRequest) -> FakeBlockResponse:
        self.asked.append(request)
        if self.refusal is not None:
            raise self.refusal
        return FakeBlockResponse(self, request.blocks)

    def count_sent(self, caller: str, nbytes: int) -> None:
        self.bytes_sent += nbytes


@pytest.fixture
def node(tmp_path: Path) -> FakeRequestHandler:
    file = tmp_path / "data"
    file.write_bytes(DATA)
    return FakeRequestHandler(os.open(file, os.O_RDONLY | os.O_CLOEXEC))


@pytest.fixture
async def serve(node: FakeRequestHandler, nursery: trio.Nursery) -> Callable[..., Any]:
    async def start(**options: Any) -> SimpleNamespace:
        server = PeerServer(node, "127.0.0.1", 0, **{"connections": 10, **options})
        return SimpleNamespace(port=await nursery.start(server.run))

    return start


def request(blocks: range = range(3), **more: Any) -> BlockRequest:
    return BlockRequest(VERSION.id, blocks, VERSION, BLOCK, 10.0, caller="me", **more)


def fetch(client: PeerClient, url: str, asked: BlockRequest) -> bytes:
    """In a thread: the checked bytes of the answer."""
    answer = client.request_blocks(url, asked, SIZE, RequestTimeout(DEADLINE))
    try:
        blocks = CheckedBlocks()
        answer.receive_into(blocks)
        return bytes(blocks.data)
    finally:
        answer.close()


async def in_thread(work: Callable[..., Any], *arguments: Any, seconds: float = DEADLINE) -> Any:
    with trio.fail_after(seconds):
        return await trio.to_thread.run_sync(functools.partial(work, *arguments), abandon_on_cancel=True)


def url_of(server: SimpleNamespace, scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{server.port}"


async def test_blocks_with_their_checksums_over_one_connection(node: FakeRequestHandler, serve: Any) -> None:
    server = await serve(connections=1)
    client = PeerClient("me")
    for _ in range(3):
        assert await in_thread(fetch, client, url_of(server), request()) == DATA
    assert await in_thread(fetch, client, url_of(server), request(range(1, 2))) == DATA[BLOCK : 2 * BLOCK]
    with trio.fail_after(DEADLINE):
        while node.closed < 4:  # noqa: ASYNC110  the last answer is closed after its last byte
            await trio.sleep(0.01)
    assert node.bytes_sent == 3 * SIZE + BLOCK
    client.close()


async def test_what_curl_gets(serve: Any) -> None:
    server = await serve()

    def plain() -> bytes:
        import urllib.request

        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        target = f"{url_of(server)}/v1/objects/{VERSION.id}/blocks/0-2?frames=0"
        with opener.open(target, timeout=DEADLINE) as answer:
            return bytes(answer.read())

    assert await in_thread(plain) == DATA


async def test_a_block_is_passed_on_before_the_next_is_there(node: FakeRequestHandler, serve: Any) -> None:
    server = await serve()
    client = PeerClient("me")
    first_came, go_on = threading.Event(), trio.Event()

    async def before(block: int) -> None:
        if block == 1:
            await go_on.wait()

    node.before = before

    class NotedBlocks(CheckedBlocks):
        def end_block(self) -> bool:
            if len(self.data) == BLOCK:
                first_came.set()
            return super().end_block()

    def work() -> bytes:
        blocks = NotedBlocks()
        client.request_blocks(url_of(server), request(), SIZE, RequestTimeout(DEADLINE)).receive_into(blocks)
        return bytes(blocks.data)

    async with trio.open_nursery() as inner:
        results: list[bytes] = []

        async def read() -> None:
            results.append(await in_thread(work))

        inner.start_soon(read)
        assert await in_thread(first_came.wait, DEADLINE)
        go_on.set()
    assert results == [DATA]


class RecordingTimeout(RequestTimeout):
    def __init__(self) -> None:
        super().__init__(DEADLINE)
        self.ages: list[float] = []
        self.parts = 0

    def bytes_arrived(self) -> None:
        self.parts += 1

    def node_waiting(self, age: float) -> None:
        self.ages.append(age)


async def test_a_node_that_waits_says_so(node: FakeRequestHandler, serve: Any) -> None:
    server = await serve()
    looks = RecordingTimeout()

    def work() -> bytes:
        blocks = CheckedBlocks()
        PeerClient("me").request_blocks(url_of(server), request(), SIZE, looks).receive_into(blocks)
        return bytes(blocks.data)

    node.ages = [0.0, 2.25, 0.125]
    assert await in_thread(work) == DATA
    assert looks.ages == [0.0, 2.25, 0.125]
    assert looks.parts


async def test_who_is_no_node_is_told_nothing_in_between(node: FakeRequestHandler, serve: Any) -> None:
    server = await serve()
    node.ages = [0.0, 1.0]
    head = f"GET /v1/objects/{VERSION.id}/blocks/0-2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    said = await in_thread(talk, server.port, head.encode())
    assert said.startswith(b"HTTP/1.1 200 ")


async def test_an_answer_that_breaks_off_is_seen(node: FakeRequestHandler, serve: Any) -> None:
    server = await serve()

    async def before(block: int) -> None:
        await trio.lowlevel.checkpoint()
        if block == 2:
            raise UnavailableError("the origin is away")

    node.before = before
    with pytest.raises(PeerError, match="broke off"):
        await in_thread(fetch, PeerClient("me"), url_of(server), request())


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, PeerMissError),
        (421, PeerMissError),
        (307, PeerRedirectError),
        (503, PeerBusyError),
        (410, PeerVersionGoneError),
        (403, PeerRefusedError),
        (502, PeerError),
        (409, PeerError),
    ],
)
async def test_each_refusal_has_its_error(
    node: FakeRequestHandler, serve: Any, status: int, kind: type[PeerError]
) -> None:
    server = await serve()
    node.refusal = RequestError(status, "because", {"Location": "http://x:1/y", "Retry-After": "2"})
    client = PeerClient("me")
    with pytest.raises(kind, match="because") as caught:
        await in_thread(fetch, client, url_of(server), request())
    assert type(caught.value) is kind
    node.refusal = None
    assert await in_thread(fetch, client, url_of(server), request()) == DATA


async def test_nobody_gets_in_without_the_secret(node: FakeRequestHandler, serve: Any) -> None:
    server = await serve(verifier=RequestVerifier(SECRET, ""))
    good = PeerClient("me", signer=RequestSigner(SECRET, "me", ""))
    assert await in_thread(fetch, good, url_of(server), request()) == DATA
    assert await in_thread(good.request_json, url_of(server), "/v1/objects", DEADLINE) == [{"id": VERSION.id}]
    for bad in (PeerClient("me"), PeerClient("me", signer=RequestSigner("another secret of ours", "me", ""))):
        with pytest.raises(PeerRefusedError):
            await in_thread(fetch, bad, url_of(server), request())
        with pytest.raises(PeerRefusedError):
            await in_thread(bad.request_json, url_of(server), "/v1/objects", DEADLINE)
    assert len(node.asked) == 1
    async with HttpProbe() as probe:
        assert (await probe(url_of(server))).name == "fake"


async def test_a_clock_that_is_ten_minutes_off(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    import time

    server = await serve(verifier=RequestVerifier(SECRET, "", lambda: time.time() + 600))
    client = PeerClient("me", signer=RequestSigner(SECRET, "me", ""))
    for _ in range(2):
        assert await in_thread(fetch, client, url_of(server), request()) == DATA
    assert caplog.text.count("its clock differs from ours by") == 1


def talk(port: int, data: bytes) -> bytes:
    """The server's answer to these bytes, until it closes or is silent for a moment."""
    with socket.create_connection(("127.0.0.1", port), DEADLINE) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(DEADLINE)
        said = b""
        try:
            while part := sock.recv(65536):
                said += part
        except ConnectionResetError:
            pass
        return said


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /v1/health HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 20_000, b"431"),
        (b"POST /v1/health HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", b"405"),
        (b"GET /v1/health HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", b"413"),
        (b"GET /v1/health HTTP/1.1\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00", b""),
        (b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
    ],
)
async def test_what_is_no_request_of_ours(serve: Any, data: bytes, status: bytes) -> None:
    server = await serve()
    said = await in_thread(talk, server.port, data)
    assert (
        said.startswith(b"HTTP/1.1 " + status) if status else not said or b" 400 " in said.split(b"\r\n")[0]
    )


async def test_a_thousand_odd_requests_later_it_still_answers(serve: Any) -> None:
    server = await serve()
    seed = random.Random(11)
    good = (
        f"GET /v1/objects/{VERSION.id}/blocks/0-0 HTTP/1.1\r\nHost: x\r\nFusecache-Hops: 1\r\n\r\n".encode()
    )

    def attack() -> None:
        for _ in range(250):
            data = bytearray(good)
            for _ in range(seed.randrange(1, 8)):
                at = seed.randrange(len(data))
                data[at : at + seed.randrange(3)] = seed.randbytes(seed.randrange(4))
            said = talk(server.port, bytes(data))
            assert not said or said[:9] == b"HTTP/1.1 "
            assert not said.startswith(b"HTTP/1.1 5")

    async with trio.open_nursery() as inner:
        for _ in range(4):
            inner.start_soon(functools.partial(in_thread, attack, seconds=5 * DEADLINE))
    assert await in_thread(fetch, PeerClient("me"), url_of(server), request()) == DATA


async def test_connections_beyond_the_limit_wait_for_their_turn(serve: Any) -> None:
    server = await serve(connections=1)
    first = await trio.open_tcp_stream("127.0.0.1", server.port)
    await first.send_all(b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"200" in bytes(await first.receive_some(4096))
    second = await trio.open_tcp_stream("127.0.0.1", server.port)
    await second.send_all(b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n")
    await first.aclose()
    with trio.fail_after(DEADLINE):
        assert b"200" in bytes(await second.receive_some(4096))
    await second.aclose()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Authorities `ours` and `other`, each with a certificate for a node."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ours", "other"):
        openssl("req", "-x509", *key, "-keyout", f"{name}.key", "-out", f"{name}.ca", "-subj", f"/CN={name}")
        openssl("req", *key, "-keyout", f"{name}-node.key", "-out", "node.csr", "-subj", "/CN=node")
        openssl(
            "x509",
            "-req",
            "-in",
            "node.csr",
            "-CA",
            f"{name}.ca",
            "-CAkey",
            f"{name}.key",
            "-CAcreateserial",
            "-out",
            f"{name}-node.pem",
        )
    return folder


def tls(folder: Path, name: str) -> PeerSettings:
    return PeerSettings(
        tls_cert=folder / f"{name}-node.pem",
        tls_key=folder / f"{name}-node.key",
        tls_ca=folder / f"{name}.ca",
    )


async def test_mutual_tls(serve: Any, certificates: Path) -> None:
    server = await serve(tls=load_credentials(tls(certificates, "ours")).server_tls)
    ours = load_credentials(tls(certificates, "ours")).client_tls
    client = PeerClient("me", tls=ours)
    assert await in_thread(fetch, client, url_of(server, "https"), request()) == DATA
    async with HttpProbe(ours) as probe:
        assert (await probe(url_of(server, "https"))).name == "fake"
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname = False
    anybody.load_verify_locations(certificates / "ours.ca")
    for wrong in (load_credentials(tls(certificates, "other")).client_tls, anybody):
        with pytest.raises(PeerError):
            await in_thread(fetch, PeerClient("me", tls=wrong), url_of(server, "https"), request())


async def test_recordings_are_given_to_who_asks_by_name(node: FakeRequestHandler, serve: Any) -> None:
    name = "0123456789abcdef" * 2
    node.profiles[name] = b"in this order"
    server = await serve()
    client = PeerClient("me")
    get = functools.partial(client.request_profile, url_of(server), max_bytes=1000)
    assert await in_thread(functools.partial(get, name, 5.0, has_profile=True)) == b"in this order"
    assert await in_thread(get, name[::-1], 5.0) is None
    assert node.profile_requests == [(name, "me", True), (name[::-1], "me", False)]
    node.profiles[name] = bytes(1001)
    with pytest.raises(PeerError):
        await in_thread(get, name, 5.0)
    client.close()


async def test_a_kept_connection_makes_room_for_who_has_none(
    serve: Callable[..., Any], node: FakeRequestHandler
) -> None:
    server = await serve(connections=2)
    url = f"http://127.0.0.1:{server.port}"

    def ask(client: PeerClient) -> bytes:
        blocks = CheckedBlocks()
        client.request_blocks(url, request(), SIZE, RequestTimeout(DEADLINE)).receive_into(blocks)
        return bytes(blocks.data)

    clients = [PeerClient("me") for _ in range(6)]
    with trio.fail_after(DEADLINE):
        for client in [*clients, *clients]:
            assert await trio.to_thread.run_sync(ask, client) == DATA
        # those that are at work are not touched
        both, go_on = trio.Event(), trio.Event()
        asked = len(node.asked)

        async def hold(_block: int) -> None:
            if len(node.asked) == asked + 2:
                both.set()
            await go_on.wait()

        node.before = hold
        async with trio.open_nursery() as nursery:
            found: list[bytes] = []

            async def one(client: PeerClient) -> None:
                found.append(await trio.to_thread.run_sync(ask, client))

            for client in clients[:3]:
                nursery.start_soon(one, client)
            await both.wait()
            go_on.set()
        assert found == [DATA] * 3
    for client in clients:
        client.close()
