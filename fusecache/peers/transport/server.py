"""The server's end of the exchange: h11 on trio, bodies with sendfile(2) in threads.

One task per connection. It waits for blocks that are still on their way without a thread, and takes one only to send
what is there: the event loop touches neither the disk nor a full socket. What can't be understood is answered with
400 and the connection is closed; no more than a head is ever read, since no request has a body.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import h11
import trio

from fusecache.errors import ConfigError, FusecacheError
from fusecache.peers.member import NodeInfo, pack_node_info
from fusecache.peers.transport.auth import RequestVerifier
from fusecache.peers.transport.congestion import set_congestion_control
from fusecache.peers.transport.wire import (
    AGE_HEADER,
    CONTENT_TYPE,
    FRAME_HEADER,
    MAX_HEAD_BYTES,
    BlockRequest,
    RequestError,
    parse_block_request,
    parse_profile_target,
)

_log = logging.getLogger(__name__)

_IDLE_TIMEOUT = 60.0
"""Seconds that an unused connection is kept; longer than clients keep theirs."""
_HEAD_TIMEOUT = 10.0
"""Seconds in which a begun head, or a short answer, has to pass."""
_STALL_TIMEOUT = 15.0
"""Seconds without a byte taken after which a receiver is given up."""
_STOP_POLL_INTERVAL = 0.25
"""Seconds between looks at whether the server ends."""
_TLS_CHUNK = 256 * 1024
_BACKLOG = 1024
_TCP_NOTSENT_LOWAT = 25
"""tcp(7); Python 3.11 has no name for it."""
_MAX_UNSENT = 256 * 1024
"""Bytes that a socket takes beyond what is on its way: an answer that waits for room is seen to wait, instead of lying
in the kernel's buffer, and the next caller can be sent elsewhere."""


@dataclass(frozen=True)
class Piece:
    """One block that is there: `length` bytes at `offset` of the file `fd`, or `data`."""

    block: int
    checksum: int
    length: int
    fd: int = -1
    offset: int = 0
    data: bytes | None = None


class BlockResponse(Protocol):
    """The answer to a request for blocks, in the making."""

    block_lengths: Sequence[int]
    """Of the blocks, in bytes."""
    all_stored: bool
    """All of them are there already."""

    async def next_pieces(self) -> list[Piece] | float:
        """The next blocks, in order, at least one: waits until it is there. Or, some seconds later, how many seconds
        ago it was certain that they are on their way, and worth waiting for. Raises FusecacheError when they can't be
        had, trio.TooSlowError when the request's deadline is over. The pieces hold until the next call."""
        ...

    def close(self) -> None:
        """No more is wanted."""
        ...


class PeerRequestHandler(Protocol):
    """What a server asks of its node."""

    def node_info(self) -> NodeInfo:
        """See Health; quick."""
        ...

    def coverage(self) -> list[dict[str, Any]]:
        """What is stored of which object. In a thread."""
        ...

    def metrics_page(self) -> str:
        """In the text format of Prometheus. In a thread."""
        ...

    def load_profile(self, name: str, caller: str, caller_has_profile: bool) -> bytes | None:
        """The recording of this name; `have`: who asks, this node, has it. In a thread."""
        ...

    async def begin_response(self, request: BlockRequest) -> BlockResponse:
        """Begin to answer; may wait for its turn. Raises RequestError."""
        ...

    def count_sent(self, caller: str, nbytes: int) -> None:
        """So many bytes of blocks went to this node. Any thread."""
        ...


class PeerServer:
    """Answers requests at (host, port) with what `handler` has; port 0: any free port."""

    def __init__(
        self,
        handler: PeerRequestHandler,
        host: str,
        port: int,
        *,
        connections: int,
        verifier: RequestVerifier | None = None,
        tls: ssl.SSLContext | None = None,
        congestion: str = "",
    ) -> None:
        self._host = host
        self._port = port
        self._handler = handler
        self._verifier = verifier
        self._tls = tls
        self._congestion = congestion
        self._connection_slots = trio.Semaphore(connections)
        self._idle_scopes: dict[trio.CancelScope, None] = {}
        """Of connections that wait for a request, the one that waits longest first."""
        self._stopping = threading.Event()
        self._thread_limiter = trio.CapacityLimiter(256)

    async def run(self, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started, with its port, when it listens. Raises ConfigError when the address, or
        `congestion`, can't be had."""
        try:
            listeners = await trio.open_tcp_listeners(self._port, host=self._host or None, backlog=_BACKLOG)
        except OSError as error:
            raise ConfigError(
                f"peers.listen={self._host}:{self._port}: {error.strerror or error}: choose another address"
            ) from None
        try:
            for listener in listeners:
                set_congestion_control(listener.socket, self._congestion)
            async with trio.open_nursery() as nursery:
                for listener in listeners:
                    nursery.start_soon(self._accept_connections, listener, nursery)
                task_status.started(listeners[0].socket.getsockname()[1])
        finally:
            self._stopping.set()
            for listener in listeners:
                listener.socket.close()

    async def _accept_connections(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        while True:
            if not self._connection_slots.value and self._idle_scopes:
                # in a cluster of more nodes than connections each would keep one for a minute that others wait for
                next(iter(self._idle_scopes)).cancel()
            await self._connection_slots.acquire()
            try:
                stream = await listener.accept()
            except OSError as error:
                self._connection_slots.release()
                _log.warning("peers: can't accept a connection: %s", error.strerror)
                await trio.sleep(0.1)
                continue
            except BaseException:
                self._connection_slots.release()
                raise
            nursery.start_soon(self._serve_connection, stream)

    async def _serve_connection(self, stream: trio.SocketStream) -> None:
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(stream.socket.close)
                if self._tls is None:
                    raw = socket.socket(fileno=os.dup(stream.socket.fileno()))
                    stack.callback(raw.close)
                    raw.setblocking(False)
                    raw.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _MAX_UNSENT)
                    await _ServerConnection(self, stream, raw).run()
                    return
                secure = trio.SSLStream(stream, self._tls, server_side=True)
                with trio.move_on_after(_HEAD_TIMEOUT) as scope:
                    await secure.do_handshake()
                if not scope.cancelled_caught:
                    await _ServerConnection(self, secure, None).run()
        except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError, OSError) as error:
            _log.debug("peers: a connection broke: %s", type(error).__name__)
        except Exception:
            _log.exception("peers: a connection ended in an unforeseen error")
        finally:
            self._connection_slots.release()

    def authenticate_request(self, method: str, target: str, headers: Mapping[str, str]) -> str:
        """The node that asks. Raises RequestError."""
        if self._verifier is None:
            return headers.get("fusecache-node", "")
        return self._verifier.verify_request(method, target, headers)

    @contextlib.contextmanager
    def waiting_for_request(self, scope: trio.CancelScope) -> Iterator[None]:
        """While a connection waits for a request; the scope is cancelled when others need its place."""
        if self._connection_slots.statistics().tasks_waiting:
            scope.cancel()
        self._idle_scopes[scope] = None
        try:
            yield
        finally:
            del self._idle_scopes[scope]

    @property
    def handler(self) -> PeerRequestHandler:
        """Whom it serves."""
        return self._handler

    async def run_in_thread(self, work: Callable[[], Any]) -> Any:
        """Run what may wait for a disk or a socket."""
        return await trio.to_thread.run_sync(work, limiter=self._thread_limiter)

    @property
    def is_stopping(self) -> bool:
        """Whether threads have to give up."""
        return self._stopping.is_set()


class _ServerConnection:
    def __init__(self, server: PeerServer, stream: trio.abc.Stream, raw_socket: socket.socket | None) -> None:
        self._server = server
        self._stream = stream
        self._raw_socket = raw_socket
        """A second descriptor of the socket, not blocking; None: TLS."""
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._has_answered = False

    async def run(self) -> None:
        """Answer requests until either side has enough."""
        while True:
            try:
                request = await self._read_request()
                if request is None:
                    return
                await self._answer_request(request)
                self._has_answered = True
            except h11.RemoteProtocolError as error:
                with contextlib.suppress(h11.LocalProtocolError):
                    status = error.error_status_hint or 400
                    await self._send_refusal(RequestError(status, "not a request of HTTP/1.1"), close=True)
                return
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                return
            self._http.start_next_cycle()

    async def _read_request(self) -> h11.Request | None:
        """The next request, with the end of its (empty) body; None: there is none."""
        request: h11.Request | None = None
        patience = _IDLE_TIMEOUT
        while True:
            with trio.move_on_after(patience) as scope:
                while True:
                    event = self._http.next_event()
                    if event is not h11.NEED_DATA:
                        break
                    kept = self._has_answered and patience == _IDLE_TIMEOUT
                    with self._server.waiting_for_request(scope) if kept else contextlib.nullcontext():
                        data = await self._stream.receive_some(65536)
                    self._http.receive_data(bytes(data))
                    if data and patience == _IDLE_TIMEOUT:
                        patience = _HEAD_TIMEOUT
                        scope.deadline = trio.current_time() + _HEAD_TIMEOUT
            if scope.cancelled_caught or isinstance(event, h11.ConnectionClosed):
                return None
            if isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.EndOfMessage):
                return request
            else:
                raise h11.RemoteProtocolError("no request has a body", error_status_hint=413)

    async def _answer_request(self, request: h11.Request) -> None:
        method, target = request.method.decode("ascii"), request.target.decode("ascii", "replace")
        headers: dict[str, str] = {}
        try:
            for name, value in request.headers:
                key = name.decode("ascii").lower()
                if key in headers and (key.startswith("fusecache-") or key == "authorization"):
                    raise RequestError(400, f"{key} is there twice")
                headers[key] = value.decode("utf-8", "replace")
            if method != "GET":
                raise RequestError(405, "only GET is understood", {"Allow": "GET"})
            await self._serve_resource(method, target, headers)
        except RequestError as refusal:
            await self._send_refusal(refusal)

    async def _serve_resource(self, method: str, target: str, headers: Mapping[str, str]) -> None:
        server = self._server
        if target == "/v1/health":
            await self._send_short_response(
                200, pack_node_info(server.handler.node_info()), "application/json"
            )
            return
        asking = server.authenticate_request(method, target, headers)
        if target == "/v1/objects":
            body = json.dumps(await server.run_in_thread(server.handler.coverage)).encode() + b"\n"
            await self._send_short_response(200, body, "application/json")
        elif target == "/metrics":
            text = await server.run_in_thread(server.handler.metrics_page)
            await self._send_short_response(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")
        elif (name := parse_profile_target(target)) is not None:
            node, have = asking or headers.get("fusecache-node", ""), headers.get("fusecache-have") == "1"
            data = await server.run_in_thread(lambda: server.handler.load_profile(name, node, have))
            if data is None:
                raise RequestError(404, "no recording of this name is here")
            await self._send_short_response(200, data, "application/octet-stream")
        else:
            wanted = parse_block_request(target, headers)
            if asking and wanted.caller and asking != wanted.caller:
                raise RequestError(400, "Fusecache-Node is not who signed")
            await self._serve_blocks(wanted)

    async def _serve_blocks(self, request: BlockRequest) -> None:
        with contextlib.closing(await self._server.handler.begin_response(request)) as offer:
            pieces: list[Piece] | None
            try:
                while isinstance(found := await offer.next_pieces(), float):
                    await self._send_still_waiting(request, found)
                pieces = found
            except FusecacheError as error:
                raise RequestError(502, str(error)) from None
            except trio.TooSlowError:
                raise RequestError(504, "not within the deadline") from None
            overhead = FRAME_HEADER.size if request.with_frames else 0
            length = sum(offer.block_lengths) + overhead * len(offer.block_lengths)
            head = [
                ("Content-Type", CONTENT_TYPE if request.with_frames else "application/octet-stream"),
                ("Content-Length", str(length)),
                ("Fusecache-Stored", "1" if offer.all_stored else "0"),
            ]
            begun = self._http.send(h11.Response(status_code=200, headers=head, reason=b"OK")) or b""
            left = len(offer.block_lengths)
            while pieces:
                await self._send_pieces(begun, pieces, request)
                begun = b""
                left -= len(pieces)
                pieces = None
                if left:
                    try:
                        while isinstance(found := await offer.next_pieces(), float):
                            pass
                        pieces = found
                    except (FusecacheError, trio.TooSlowError) as error:
                        _log.debug("peers: an answer breaks off: %s", error)
            if left:
                self._http.send_failed()
                return
            self._http.send(h11.EndOfMessage())

    async def _send_still_waiting(self, request: BlockRequest, age: float) -> None:
        """Tell another node that there is no reason to ask elsewhere yet."""
        if request.caller:
            head = h11.InformationalResponse(
                status_code=102, headers=[(AGE_HEADER, f"{age:.3f}")], reason=b"Processing"
            )
            await self._send_bytes(self._http.send(head))

    async def _send_pieces(self, head: bytes, pieces: Sequence[Piece], request: BlockRequest) -> None:
        """Send `begun`, then blocks that are there, their frames before them if they are wanted."""
        for piece in pieces:
            size = piece.length + (FRAME_HEADER.size if request.with_frames else 0)
            # h11 counts the bytes by len(), and hands back what it would frame: nothing, in a body with a length
            self._http.send_with_data_passthrough(h11.Data(data=_ByteCount(size)))  # type: ignore[arg-type]
        if self._raw_socket is not None:
            raw = self._raw_socket
            await self._server.run_in_thread(lambda: self._sendfile_pieces(raw, head, pieces, request))
            return
        await self._send_bytes(head)
        async for part in self._read_chunks(pieces, request.with_frames):
            with trio.fail_after(_STALL_TIMEOUT):
                await self._stream.send_all(part)
        self._server.handler.count_sent(request.caller, sum(piece.length for piece in pieces))

    async def _read_chunks(
        self, pieces: Sequence[Piece], with_frames: bool
    ) -> AsyncIterator[bytes | memoryview]:
        for piece in pieces:
            if with_frames:
                yield FRAME_HEADER.pack(piece.checksum, piece.length, piece.block)
            for at in range(0, piece.length, _TLS_CHUNK):
                size = min(_TLS_CHUNK, piece.length - at)
                if piece.data is not None:
                    yield memoryview(piece.data)[at : at + size]
                    continue
                read = functools.partial(os.pread, piece.fd, size, piece.offset + at)
                data = await self._server.run_in_thread(read)
                if len(data) != size:
                    raise OSError("the cached file is too short")
                yield data

    def _sendfile_pieces(
        self, raw: socket.socket, head: bytes, pieces: Sequence[Piece], request: BlockRequest
    ) -> None:
        """In a thread. Raises OSError, TimeoutError among them."""
        patience = _SocketSender(raw, lambda: self._server.is_stopping)
        patience.send_bytes(head, socket.MSG_MORE)
        for piece in pieces:
            if request.with_frames:
                patience.send_bytes(
                    FRAME_HEADER.pack(piece.checksum, piece.length, piece.block), socket.MSG_MORE
                )
            if piece.data is not None:
                patience.send_bytes(piece.data, 0)
            else:
                patience.send_file_range(piece.fd, piece.offset, piece.length)
            self._server.handler.count_sent(request.caller, piece.length)

    async def _send_short_response(
        self,
        status: int,
        body: bytes,
        content_type: str,
        headers: Mapping[str, str] | None = None,
        close: bool = False,
    ) -> None:
        head = [("Content-Type", content_type), ("Content-Length", str(len(body))), *(headers or {}).items()]
        if close:
            head.append(("Connection", "close"))
        data = self._http.send(h11.Response(status_code=status, headers=head)) or b""
        data += self._http.send(h11.Data(data=body)) or b""
        data += self._http.send(h11.EndOfMessage()) or b""
        await self._send_bytes(data)

    async def _send_refusal(self, refusal: RequestError, close: bool = False) -> None:
        await self._send_short_response(
            refusal.status, refusal.body(), "application/json", refusal.headers, close
        )

    async def _send_bytes(self, data: bytes | None) -> None:
        with trio.move_on_after(_HEAD_TIMEOUT) as scope:
            await self._stream.send_all(data or b"")
        if scope.cancelled_caught:
            raise trio.BrokenResourceError


class _ByteCount:
    """So many bytes, for h11's count."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


class _SocketSender:
    """Sends on a socket that does not block, and waits at most _STALLED seconds for room. Raises OSError."""

    def __init__(self, sock: socket.socket, is_stopping: Callable[[], bool]) -> None:
        self._sock = sock
        self._is_stopping = is_stopping
        self._poll = select.poll()
        self._poll.register(sock, select.POLLOUT)

    def _wait_for_room(self) -> None:
        until = time.monotonic() + _STALL_TIMEOUT
        while not self._poll.poll(math.ceil(_STOP_POLL_INTERVAL * 1000)):
            if self._is_stopping():
                raise ConnectionAbortedError("the server ends")
            if time.monotonic() > until:
                raise TimeoutError("the receiver takes no bytes")

    def send_bytes(self, data: bytes, flags: int) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view, flags) :]
            except BlockingIOError:
                self._wait_for_room()

    def send_file_range(self, fd: int, offset: int, length: int) -> None:
        while length:
            try:
                sent = os.sendfile(self._sock.fileno(), fd, offset, length)
            except BlockingIOError:
                self._wait_for_room()
                continue
            if not sent:
                raise OSError("the cached file is too short")
            offset += sent
            length -= sent
