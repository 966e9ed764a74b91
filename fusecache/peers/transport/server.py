"""The server's end of the protocol between nodes: h11 on trio, bodies with sendfile(2) in threads.

There is one task per connection. It waits without a thread for blocks that are still on their way, and takes a thread
only to send blocks that are there: the event loop touches neither the disk nor a full socket. A request that can't be
understood is answered with 400, and the connection is closed; the server never reads more than a head, since no request
has a body. The module knows nothing of fetching: a PeerRequestHandler has the blocks.
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
"""Seconds after which the server gives up a receiver that takes no byte."""
_STOP_POLL_INTERVAL = 0.25
"""Seconds after which a thread that waits for room in a socket looks whether the server ends."""
_TLS_CHUNK = 256 * 1024
ACCEPT_BACKLOG = 1024
"""Connections that wait to be accepted; the simulation has as many."""
_TCP_NOTSENT_LOWAT = 25
"""tcp(7); Python 3.11 has no name for it."""
_MAX_UNSENT = 256 * 1024
"""Bytes that a socket takes beyond those on the wire. With this limit the bytes of a slow receiver are still counted as
unsent, instead of lying in the kernel's buffer, and the next caller can be sent to another node."""


@dataclass(frozen=True)
class Piece:
    """One block that is there: `length` bytes at `offset` of the file `fd`, or those in `data`."""

    block: int
    checksum: int
    length: int
    fd: int = -1
    offset: int = 0
    data: bytes | None = None


class BlockResponse(Protocol):
    """The answer to one request for blocks. The server calls it in the trio thread, and closes it in any case."""

    block_lengths: Sequence[int]
    """Bytes of each requested block, in order."""
    all_stored: bool
    """Whether this node had all of the blocks when the answer began."""

    async def next_pieces(self) -> list[Piece] | float:
        """Wait for the next blocks in order, and return at least one of them. While they do not come, return every few
        seconds for how long (in seconds) it has been uncertain that they are on their way. The pieces are valid until
        the next call. Raises FusecacheError when the blocks can't be had, trio.TooSlowError when the deadline of the
        request has passed or the blocks are not worth waiting for any more."""
        ...

    def close(self) -> None:
        """The server wants no more of it. Must be called once; blocks nothing."""
        ...


class PeerRequestHandler(Protocol):
    """The node that a server answers for."""

    def node_info(self) -> NodeInfo:
        """This node's introduction. Quick; called in the trio thread."""
        ...

    def coverage(self) -> list[dict[str, Any]]:
        """How much this node has of which object, ready for JSON. Called in a thread, since it may take a while."""
        ...

    def metrics_page(self) -> str:
        """The metrics, in the text format of Prometheus. Called in a thread, since it may take a while."""
        ...

    def load_profile(self, name: str, caller: str, caller_has_profile: bool) -> bytes | None:
        """The access profile of this name; None: this node has none. `caller_has_profile`: the node `caller` has it,
        and lets this one take it. Called in a thread; does I/O."""
        ...

    async def begin_response(self, request: BlockRequest) -> BlockResponse:
        """Begin to answer; waits in a queue while too many answers are under way. Raises RequestError, which is then
        the answer."""
        ...

    def count_sent(self, caller: str, nbytes: int) -> None:
        """So many bytes of blocks went to the node `caller` ("": the caller gave no name). Called from any thread."""
        ...


class PeerServer:
    """Answers requests at (host, port) with what `handler` has; port 0: any free port. At most `connections` are open
    at a time: when another client waits, the one that has been idle for longest is closed. With a `verifier` requests
    have to be signed, with `tls` clients need a certificate. `congestion` names the TCP congestion control.

    All state belongs to the trio thread, but for the event that tells the sending threads that the server ends.
    """

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
        """Scopes of the connections that wait for a request, the one that has waited for longest first."""
        self._stopping = threading.Event()
        self._thread_limiter = trio.CapacityLimiter(256)

    async def run(self, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started, with its port, when it listens. Raises ConfigError when the address, or
        `congestion`, can't be had."""
        try:
            listeners = await trio.open_tcp_listeners(
                self._port, host=self._host or None, backlog=ACCEPT_BACKLOG
            )
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
                # with more nodes than connections each idle one would be kept for a minute, while other nodes wait
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
        """The name of the calling node: the proved one, or without signatures the one that it claims ("": none).
        Raises RequestError 401, 403 or 503."""
        if self._verifier is None:
            return headers.get("fusecache-node", "")
        return self._verifier.verify_request(method, target, headers)

    @contextlib.contextmanager
    def waiting_for_request(self, scope: trio.CancelScope) -> Iterator[None]:
        """Entered while a connection waits for a request: `scope` is cancelled when another client needs its place."""
        if self._connection_slots.statistics().tasks_waiting:
            scope.cancel()
        self._idle_scopes[scope] = None
        try:
            yield
        finally:
            del self._idle_scopes[scope]

    @property
    def handler(self) -> PeerRequestHandler:
        """The node that has the answers."""
        return self._handler

    async def run_in_thread(self, work: Callable[[], Any]) -> Any:
        """Run `work`, which may wait for a disk or a socket, in a thread, and return its result."""
        return await trio.to_thread.run_sync(work, limiter=self._thread_limiter)

    @property
    def is_stopping(self) -> bool:
        """Whether the server ends, and threads have to give up."""
        return self._stopping.is_set()


class _ServerConnection:
    """One client's connection, served by one task: h11 keeps its state, which is idle, a request read, or an answer
    begun."""

    def __init__(self, server: PeerServer, stream: trio.abc.Stream, raw_socket: socket.socket | None) -> None:
        self._server = server
        self._stream = stream
        self._raw_socket = raw_socket
        """A second, non-blocking descriptor of the socket, for sendfile(2); None: TLS, where Python sends the bytes."""
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._has_answered = False

    async def run(self) -> None:
        """Answer requests until either side closes the connection."""
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
        timeout = _IDLE_TIMEOUT
        while True:
            with trio.move_on_after(timeout) as scope:
                while True:
                    event = self._http.next_event()
                    if event is not h11.NEED_DATA:
                        break
                    is_idle = self._has_answered and timeout == _IDLE_TIMEOUT
                    with self._server.waiting_for_request(scope) if is_idle else contextlib.nullcontext():
                        data = await self._stream.receive_some(65536)
                    self._http.receive_data(bytes(data))
                    if data and timeout == _IDLE_TIMEOUT:
                        timeout = _HEAD_TIMEOUT
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
        caller = server.authenticate_request(method, target, headers)
        if target == "/v1/objects":
            body = json.dumps(await server.run_in_thread(server.handler.coverage)).encode() + b"\n"
            await self._send_short_response(200, body, "application/json")
        elif target == "/metrics":
            text = await server.run_in_thread(server.handler.metrics_page)
            await self._send_short_response(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")
        elif (name := parse_profile_target(target)) is not None:
            node, has_profile = (
                caller or headers.get("fusecache-node", ""),
                headers.get("fusecache-have") == "1",
            )
            data = await server.run_in_thread(lambda: server.handler.load_profile(name, node, has_profile))
            if data is None:
                raise RequestError(404, "no profile of this name is here")
            await self._send_short_response(200, data, "application/octet-stream")
        else:
            request = parse_block_request(target, headers)
            if caller and request.caller and caller != request.caller:
                raise RequestError(400, "Fusecache-Node is not who signed")
            await self._serve_blocks(request)

    async def _serve_blocks(self, request: BlockRequest) -> None:
        with contextlib.closing(await self._server.handler.begin_response(request)) as response:
            pieces: list[Piece] | None
            try:
                while isinstance(found := await response.next_pieces(), float):
                    await self._send_still_waiting(request, found)
                pieces = found
            except FusecacheError as error:
                raise RequestError(502, str(error)) from None
            except trio.TooSlowError:
                raise RequestError(504, "not within the deadline") from None
            overhead = FRAME_HEADER.size if request.with_frames else 0
            length = sum(response.block_lengths) + overhead * len(response.block_lengths)
            head = [
                ("Content-Type", CONTENT_TYPE if request.with_frames else "application/octet-stream"),
                ("Content-Length", str(length)),
                ("Fusecache-Stored", "1" if response.all_stored else "0"),
            ]
            begun = self._http.send(h11.Response(status_code=200, headers=head, reason=b"OK")) or b""
            left = len(response.block_lengths)
            while pieces:
                await self._send_pieces(begun, pieces, request)
                begun = b""
                left -= len(pieces)
                pieces = None
                if left:
                    try:
                        while isinstance(found := await response.next_pieces(), float):
                            pass
                        pieces = found
                    except (FusecacheError, trio.TooSlowError) as error:
                        _log.debug("peers: an answer breaks off: %s", error)
            if left:
                self._http.send_failed()
                return
            self._http.send(h11.EndOfMessage())

    async def _send_still_waiting(self, request: BlockRequest, age: float) -> None:
        """Send a node an interim answer: it has no reason to ask elsewhere yet."""
        if request.caller:
            head = h11.InformationalResponse(
                status_code=102, headers=[(AGE_HEADER, f"{age:.3f}")], reason=b"Processing"
            )
            await self._send_bytes(self._http.send(head))

    async def _send_pieces(self, head: bytes, pieces: Sequence[Piece], request: BlockRequest) -> None:
        """Send `head`, then the pieces, each after its frame header unless the caller wants the bytes alone."""
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
        """Blocks: runs in a thread. Raises OSError, TimeoutError among them."""
        sender = _SocketSender(raw, lambda: self._server.is_stopping)
        sender.send_bytes(head, socket.MSG_MORE)
        for piece in pieces:
            if request.with_frames:
                sender.send_bytes(
                    FRAME_HEADER.pack(piece.checksum, piece.length, piece.block), socket.MSG_MORE
                )
            if piece.data is not None:
                sender.send_bytes(piece.data, 0)
            else:
                sender.send_file_range(piece.fd, piece.offset, piece.length)
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
    """Stands for so many bytes where h11 only counts them."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


class _SocketSender:
    """Sends on a non-blocking socket from a thread; waits for room for _STALL_TIMEOUT seconds at most. Methods raise
    OSError."""

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
