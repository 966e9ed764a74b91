"""The client's end of the exchange: blocking sockets for worker threads, kept open and used again.

Bodies are received with one recv(MSG_WAITALL) per chunk, straight into a buffer that is used again and again.
SO_RCVTIMEO ends each wait after a moment, so that whoever waits can look around:
whether the node is still alive, and whether the reader still is.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import logging
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol
from urllib.parse import urlsplit

from fusecache.blocks import block_length
from fusecache.peers.errors import (
    PeerBusyError,
    PeerConnectTimeoutError,
    PeerError,
    PeerMissError,
    PeerRedirectError,
    PeerRefusedError,
    PeerVersionGoneError,
)
from fusecache.peers.transport.auth import RequestSigner
from fusecache.peers.transport.wire import (
    AGE_HEADER,
    FRAME_HEADER,
    MAX_HEAD_BYTES,
    BlockRequest,
    parse_age,
    parse_frame_checksum,
    profile_target,
)

_log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_IDLE_TIMEOUT = 20.0
"""Seconds that an unused connection is kept."""
_MAX_IDLE_CONNECTIONS = 32
"""Unused connections kept per node."""
_POLL_INTERVAL = 0.5
"""Seconds between looks around while nothing comes."""
_MAX_ERROR_BODY = 16 * 1024
_MAX_JSON_BODY = 64 << 20
"""Bytes of a JSON answer."""


_SO_RCVBUFFORCE = 33
"""socket(7); Python 3.11 has no name for it."""


class TransferObserver(Protocol):
    """Looks on while an answer is waited for. All of it is called in the thread that waits, and has to be quick."""

    def bytes_arrived(self) -> None:
        """Bytes of blocks came."""
        ...

    def block_begun(self) -> None:
        """The next block begins to come."""
        ...

    def node_waiting(self, age: float) -> None:
        """The node says that it waits itself; who is at the end of what is waited for said so `age` seconds ago."""
        ...

    def poll(self) -> None:
        """Called about every half second; may raise to give up."""
        ...


class RequestTimeout:
    """A Watch that gives up `timeout` seconds from now: it raises PeerError."""

    def __init__(self, url: str, timeout: float) -> None:
        self._url = url
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout

    def bytes_arrived(self) -> None:
        """See Watch."""

    def block_begun(self) -> None:
        """See Watch."""

    def node_waiting(self, age: float) -> None:
        """See Watch."""

    def poll(self) -> None:
        """See Watch."""
        if time.monotonic() > self._deadline:
            raise PeerError(f"{self._url}: no answer within {self._timeout:g} s")


class _ClientConnection:
    """A kept connection; used by one request at a time."""

    def __init__(self, url: str, tls: ssl.SSLContext | None, timeout: float, receive_window: int) -> None:
        parts = urlsplit(url)
        self.netloc = parts.netloc
        sock = _connect_socket(parts.hostname or "", parts.port or 0, timeout, receive_window)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.is_tls = parts.scheme == "https"
            if self.is_tls:
                sock = (tls or ssl.create_default_context()).wrap_socket(sock)
                sock.settimeout(_POLL_INTERVAL)
            else:
                sock.settimeout(None)
                glance = struct.pack("ll", 0, int(_POLL_INTERVAL * 1e6))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, glance)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 5, 0))
        except BaseException:
            sock.close()
            raise
        self.sock = sock
        self.was_used = False
        self.idle_since = 0.0

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.close()


def _connect_socket(host: str, port: int, timeout: float, receive_window: int) -> socket.socket:
    """Raises OSError. The buffer has to be set before the connection is made: its window's scale is agreed on then."""
    error: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            if receive_window:
                _set_receive_buffer(
                    sock, receive_window // 2
                )  # the kernel doubles it, and keeps half for its own accounting
            sock.settimeout(timeout)
            sock.connect(address)
            return sock
        except OSError as exc:
            sock.close()
            error = exc
    raise error or OSError("the name has no address")


def _set_receive_buffer(sock: socket.socket, size: int) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
    except PermissionError:  # no CAP_NET_ADMIN: net.core.rmem_max is the limit
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


class PeerClient:
    """Asks other nodes for blocks. Thread-safe; its lock guards the idle connections and the clocks, and is a leaf.

    `node` is this node's name; `connect_timeout` in seconds; `window` bytes at most are on their way on one connection
    (0: as the kernel finds right): many nodes send at once, and what the last switch can't hold is sent twice.
    """

    def __init__(
        self,
        own_name: str,
        *,
        signer: RequestSigner | None = None,
        tls: ssl.SSLContext | None = None,
        connect_timeout: float = 2.0,
        receive_window: int = 0,
    ) -> None:
        self._own_name = own_name
        self._signer = signer
        self._tls = tls
        self._connect_timeout = connect_timeout
        self._receive_window = receive_window
        self._lock = threading.Lock()
        self._idle_connections: dict[str, list[_ClientConnection]] = {}
        self._clock_offsets: dict[str, float] = {}
        """Seconds that a node's clock is ahead of ours, where that matters."""
        self._is_closed = False
        self._thread_local = threading.local()

    def _thread_buffer(self) -> memoryview:
        """This thread's: it receives one body at a time."""
        buffer: memoryview | None = getattr(self._thread_local, "buffer", None)
        if buffer is None:
            buffer = self._thread_local.buffer = memoryview(bytearray(_CHUNK))
        return buffer

    def close(self) -> None:
        """Close the idle connections; those in use are closed after use."""
        with self._lock:
            self._is_closed = True
            idle, self._idle_connections = self._idle_connections, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()

    def request_blocks(
        self, url: str, request: BlockRequest, object_size: int, observer: TransferObserver
    ) -> IncomingBlocks:
        """Ask the node at `url` for blocks of an object of `size` bytes; returns when the first of them comes. Raises
        PeerError, PeerConnectTimeoutError (no connection), PeerMissError (404, 421, 504), PeerRedirectError (307),
        PeerBusyError (503), PeerVersionGoneError (410), PeerRefusedError (401, 403, TLS), and what `watch` raises.
        """
        headers = request.headers()
        connection, answer, rest = self._send_with_clock_retry(url, request.target, headers, observer)
        keep = False
        try:
            if answer.status != 200:
                body = self._read_body(connection, answer, rest, observer)
                keep = len(body) == answer.length and not answer.will_close
                raise _refusal_error(url, answer, body)
            overhead = FRAME_HEADER.size * len(request.blocks)
            assert request.block_size is not None
            expected = overhead + sum(
                block_length(block, object_size, request.block_size) for block in request.blocks
            )
            if answer.length != expected:
                raise PeerError(f"{url}: sends {answer.length} bytes for {expected}")
        except BaseException:
            if keep:
                self.release_connection(url, connection)
            else:
                connection.close()
            raise
        return IncomingBlocks(
            self,
            url,
            connection,
            self._thread_buffer(),
            request,
            object_size,
            rest,
            observer,
            not answer.will_close,
        ).apply_head(answer)

    def request_json(self, url: str, target: str, timeout: float) -> Any:
        """A short answer of a node. Raises PeerError."""
        watch = RequestTimeout(url, timeout)
        connection, answer, rest = self._send_with_clock_retry(url, target, {}, watch)
        try:
            body = self._read_body(connection, answer, rest, watch, _MAX_JSON_BODY)
            if answer.status != 200:
                raise _refusal_error(url, answer, body)
            try:
                return json.loads(body)
            except (ValueError, RecursionError):
                raise PeerError(f"{url}{target}: the answer is not JSON") from None
        finally:
            connection.close()

    def request_profile(
        self, url: str, name: str, timeout: float, *, max_bytes: int, has_profile: bool = False
    ) -> bytes | None:
        """The access profile of this name that the node at `url` has; None: it has none. `has_profile`: this node has
        it, and the other one may come and take it. Raises PeerError, also for more than `max_bytes`."""
        watch = RequestTimeout(url, timeout)
        headers = {"Fusecache-Node": self._own_name}
        if has_profile:
            headers["Fusecache-Have"] = "1"
        connection, answer, rest = self._send_with_clock_retry(url, profile_target(name), headers, watch)
        keep = False
        try:
            body = self._read_body(connection, answer, rest, watch, max_bytes)
            keep = len(body) == answer.length and not answer.will_close
            if answer.status == 404:
                return None
            if answer.status != 200:
                raise _refusal_error(url, answer, body)
            if len(body) != answer.length:
                raise PeerError(f"{url}: a recording of {answer.length} bytes, or broken off")
            return body
        finally:
            if keep:
                self.release_connection(url, connection)
            else:
                connection.close()

    def _send_with_clock_retry(
        self, url: str, target: str, headers: dict[str, str], observer: TransferObserver
    ) -> tuple[_ClientConnection, http.client.HTTPResponse, bytes]:
        for attempt in range(2):
            connection, answer, rest = self._send_request(url, target, headers, observer)
            if answer.status != 401 or self._signer is None or attempt:
                break
            told = answer.getheader("Fusecache-Time") or ""
            body = self._read_body(connection, answer, rest, observer)
            connection.close()
            offset = int(told) - time.time() if told.isdecimal() and len(told) < 12 else 0.0
            if b'"reason": "clock"' not in body or abs(offset) < 1:
                raise _refusal_error(url, answer, body)
            with self._lock:
                fresh = url not in self._clock_offsets
                self._clock_offsets[url] = offset
            if fresh:
                _log.warning("%s: its clock differs from ours by %d s: set them", url, offset)
        return connection, answer, rest

    def _send_request(
        self, url: str, target: str, headers: dict[str, str], observer: TransferObserver
    ) -> tuple[_ClientConnection, http.client.HTTPResponse, bytes]:
        while True:
            connection = self._acquire_connection(url)
            reused = connection.was_used
            lines = [f"GET {target} HTTP/1.1", f"Host: {connection.netloc}", "Accept-Encoding: identity"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            if self._signer is not None:
                offset = self._clock_offsets.get(url, 0.0)
                lines.append(
                    f"Authorization: {self._signer.authorization_header('GET', target, headers, offset)}"
                )
            try:
                connection.sock.sendall("\r\n".join([*lines, "", ""]).encode())
                answer, rest = _read_head(connection, observer)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if reused and not isinstance(error, BlockingIOError | TimeoutError):
                    continue  # the node closed it while it was idle: that says nothing of this request
                raise PeerError(f"{url}: {_describe_error(error)}") from error
            except BaseException:
                connection.close()
                raise
            connection.was_used = True
            return connection, answer, rest

    def _read_body(
        self,
        connection: _ClientConnection,
        answer: http.client.HTTPResponse,
        received_ahead: bytes,
        observer: TransferObserver,
        limit: int = _MAX_ERROR_BODY,
    ) -> bytes:
        length = answer.length
        if length is None or length > limit:
            return b""
        parts, left = [received_ahead[:length]], length - len(received_ahead[:length])
        while left > 0:
            part = bytearray(min(left, 65536))
            got = _receive_some(connection, memoryview(part), observer)
            if not got:
                break
            parts.append(bytes(part[:got]))
            left -= got
        return b"".join(parts)

    def _acquire_connection(self, url: str) -> _ClientConnection:
        now = time.monotonic()
        stale, found = [], None
        with self._lock:
            idle = self._idle_connections.get(url, [])
            while idle and found is None:
                connection = idle.pop()
                if now - connection.idle_since < _IDLE_TIMEOUT:
                    found = connection
                else:
                    stale.append(connection)
        for connection in stale:
            connection.close()
        if found is not None:
            return found
        try:
            return _ClientConnection(url, self._tls, self._connect_timeout, self._receive_window)
        except ssl.SSLError as error:
            raise PeerRefusedError(f"{url}: TLS: {error.reason or error}") from error
        except TimeoutError as error:
            raise PeerConnectTimeoutError(
                f"{url}: no connection within {self._connect_timeout:g} s"
            ) from error
        except OSError as error:
            raise PeerError(f"{url}: {_describe_error(error)}") from error

    def release_connection(self, url: str, connection: _ClientConnection) -> None:
        """A connection whose answer was read to its end."""
        connection.idle_since = time.monotonic()
        with self._lock:
            idle = self._idle_connections.setdefault(url, [])
            if not self._is_closed and len(idle) < _MAX_IDLE_CONNECTIONS:
                idle.append(connection)
                return
        connection.close()


class IncomingBlocks:
    """Blocks on their way. Iterate once; `close` in any case."""

    def __init__(
        self,
        client: PeerClient,
        url: str,
        connection: _ClientConnection,
        buffer: memoryview,
        request: BlockRequest,
        object_size: int,
        received_ahead: bytes,
        observer: TransferObserver,
        keep_alive: bool,
    ) -> None:
        self.all_stored = False
        """The node had all of it when it began to answer."""
        self._client = client
        self._url = url
        self._connection: _ClientConnection | None = connection
        self._buffer = buffer
        self._request = request
        self._object_size = object_size
        self._received_ahead = received_ahead
        self._observer = observer
        self._keep_alive = keep_alive

    def apply_head(self, answer: http.client.HTTPResponse) -> IncomingBlocks:
        """Take over what the head says."""
        self.all_stored = answer.getheader("Fusecache-Stored") == "1"
        return self

    def __iter__(self) -> Iterator[int | memoryview]:
        """For each block its checksum, then its bytes in chunks; a chunk is valid until the next is asked for. Raises
        PeerError when the node breaks off, and what its watch raises."""
        connection = self._connection
        assert connection is not None
        assert self._request.block_size is not None
        buffer = self._buffer
        header = bytearray(FRAME_HEADER.size)
        for block in self._request.blocks:
            # not along with the block before: its sender may have to wait for this one
            self._receive_exactly(connection, memoryview(header))
            self._observer.block_begun()
            length = block_length(block, self._object_size, self._request.block_size)
            yield parse_frame_checksum(header, block, length)
            left = length
            while left:
                want = min(left, _CHUNK)
                self._receive_exactly(connection, buffer[:want])
                left -= want
                yield buffer[:want]
        if self._keep_alive:
            self._connection = None
            self._client.release_connection(self._url, connection)

    def _receive_exactly(self, connection: _ClientConnection, into: memoryview) -> None:
        done = 0
        if self._received_ahead:
            done = min(len(into), len(self._received_ahead))
            into[:done] = self._received_ahead[:done]
            self._received_ahead = self._received_ahead[done:]
        while done < len(into):
            try:
                got = _receive_some(connection, into[done:], self._observer)
            except OSError as error:
                raise PeerError(f"{self._url}: {_describe_error(error)}") from error
            if not got:
                raise PeerError(f"{self._url}: broke off in the middle")
            done += got
            self._observer.bytes_arrived()
            self._observer.poll()

    def close(self) -> None:
        """Let the connection go: it is closed unless all of the answer was read."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _receive_some(connection: _ClientConnection, into: memoryview, observer: TransferObserver) -> int:
    """At least one byte, or 0 at the end. Raises OSError, and what `watch` raises."""
    while True:
        try:
            if connection.is_tls:
                return connection.sock.recv_into(into)
            return connection.sock.recv_into(into, 0, socket.MSG_WAITALL)
        except (BlockingIOError, TimeoutError):
            observer.poll()
        except InterruptedError:
            continue


def _read_head(
    connection: _ClientConnection, observer: TransferObserver
) -> tuple[http.client.HTTPResponse, bytes]:
    """The head of the answer, and what came behind it. Interim ones only say that the node waits, too."""
    begun = bytearray()
    while True:
        if (end := begun.find(b"\r\n\r\n")) >= 0:
            answer = http.client.HTTPResponse(_ParsedBytes(bytes(begun[: end + 4])), method="GET")  # type: ignore[arg-type]
            answer.begin()
            del begun[: end + 4]
            if answer.status >= 200:
                return answer, bytes(begun)
            observer.node_waiting(parse_age(answer.getheader(AGE_HEADER)))
            observer.poll()
            continue
        if len(begun) > MAX_HEAD_BYTES:
            raise http.client.HTTPException("the head is too long")
        try:
            part = connection.sock.recv(16384)
        except (BlockingIOError, TimeoutError):
            observer.poll()
            continue
        if not part:
            raise ConnectionResetError("the node closed the connection")
        begun += part


class _ParsedBytes:
    """Bytes that http.client parses as if they came from a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, mode: str) -> Any:
        return io.BytesIO(self._data)


def _refusal_error(url: str, answer: http.client.HTTPResponse, body: bytes) -> PeerError:
    try:
        found = json.loads(body)
        text = str(found.get("error", ""))[:300]
    except (ValueError, AttributeError, RecursionError):
        text = ""
    text = "".join(letter if letter.isprintable() else "?" for letter in text) or f"answered {answer.status}"
    message = f"{url}: {text}"
    if answer.status in (404, 421, 504):
        return PeerMissError(message)
    if answer.status == 307:
        return PeerRedirectError(message, answer.getheader("Location") or "")
    if answer.status == 503:
        return PeerBusyError(message, min(5.0, _parse_retry_after(answer.getheader("Retry-After"))))
    if answer.status == 410:
        return PeerVersionGoneError(message)
    if answer.status in (401, 403):
        return PeerRefusedError(message)
    return PeerError(message)


def _parse_retry_after(text: str | None) -> float:
    return float(text) if text and text.isdecimal() and len(text) < 6 else 0.5


def _describe_error(error: BaseException) -> str:
    if isinstance(error, TimeoutError | BlockingIOError):
        return "no answer in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
