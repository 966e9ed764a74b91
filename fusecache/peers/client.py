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

from fusecache.blocks import block_bytes
from fusecache.peers.auth import Signer
from fusecache.peers.errors import (
    PeerBusyError,
    PeerElsewhereError,
    PeerError,
    PeerGoneError,
    PeerMissError,
    PeerRefusedError,
    PeerSilentError,
)
from fusecache.peers.wire import (
    AGE,
    FRAME,
    MAX_HEADER,
    MAX_ORDER,
    BlockRequest,
    age_of,
    frame_of,
    order_target,
)

_log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_IDLE = 20.0
"""Seconds that an unused connection is kept."""
_KEPT = 32
"""Unused connections kept per node."""
_GLANCE = 0.5
"""Seconds between looks around while nothing comes."""
_ERROR_BODY = 16 * 1024
_MAX_ANSWER = 64 << 20
"""Bytes of a JSON answer."""


_SO_RCVBUFFORCE = 33
"""socket(7); Python 3.11 has no name for it."""


class Watch(Protocol):
    """Looks on while an answer is waited for. All of it is called in the thread that waits, and has to be quick."""

    def came(self) -> None:
        """Bytes of blocks came."""
        ...

    def begins(self) -> None:
        """The next block begins to come."""
        ...

    def waits(self, age: float) -> None:
        """The node says that it waits itself; who is at the end of what is waited for said so `age` seconds ago."""
        ...

    def glance(self) -> None:
        """Called about every half second; may raise to give up."""
        ...


class Patience:
    """A Watch that gives up `timeout` seconds from now: it raises PeerError."""

    def __init__(self, url: str, timeout: float) -> None:
        self._url = url
        self._timeout = timeout
        self._until = time.monotonic() + timeout

    def came(self) -> None:
        """See Watch."""

    def begins(self) -> None:
        """See Watch."""

    def waits(self, age: float) -> None:
        """See Watch."""

    def glance(self) -> None:
        """See Watch."""
        if time.monotonic() > self._until:
            raise PeerError(f"{self._url}: no answer within {self._timeout:g} s")


class _Connection:
    """A kept connection; used by one request at a time."""

    def __init__(self, url: str, tls: ssl.SSLContext | None, timeout: float, window: int) -> None:
        parts = urlsplit(url)
        self.netloc = parts.netloc
        sock = _connected(parts.hostname or "", parts.port or 0, timeout, window)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.secure = parts.scheme == "https"
            if self.secure:
                sock = (tls or ssl.create_default_context()).wrap_socket(sock)
                sock.settimeout(_GLANCE)
            else:
                sock.settimeout(None)
                glance = struct.pack("ll", 0, int(_GLANCE * 1e6))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, glance)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 5, 0))
        except BaseException:
            sock.close()
            raise
        self.sock = sock
        self.used = False
        self.since = 0.0

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.close()


def _connected(host: str, port: int, timeout: float, window: int) -> socket.socket:
    """Raises OSError. The buffer has to be set before the connection is made: its window's scale is agreed on then."""
    error: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            if window:
                _set_buffer(sock, window // 2)  # the kernel doubles it, and keeps half for its own accounting
            sock.settimeout(timeout)
            sock.connect(address)
            return sock
        except OSError as exc:
            sock.close()
            error = exc
    raise error or OSError("the name has no address")


def _set_buffer(sock: socket.socket, size: int) -> None:
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
        node: str,
        *,
        signer: Signer | None = None,
        tls: ssl.SSLContext | None = None,
        connect_timeout: float = 2.0,
        window: int = 0,
    ) -> None:
        self._node = node
        self._signer = signer
        self._tls = tls
        self._connect_timeout = connect_timeout
        self._window = window
        self._lock = threading.Lock()
        self._idle: dict[str, list[_Connection]] = {}
        self._offsets: dict[str, float] = {}
        """Seconds that a node's clock is ahead of ours, where that matters."""
        self._closed = False
        self._local = threading.local()

    def _buffer(self) -> memoryview:
        """This thread's: it receives one body at a time."""
        buffer: memoryview | None = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = memoryview(bytearray(_CHUNK))
        return buffer

    def close(self) -> None:
        """Close the idle connections; those in use are closed after use."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()

    def blocks(self, url: str, request: BlockRequest, size: int, watch: Watch) -> Answer:
        """Ask the node at `url` for blocks of an object of `size` bytes; returns when the first of them comes. Raises
        PeerError, PeerSilentError (no connection), PeerMissError (404, 421, 504), PeerElsewhereError (307),
        PeerBusyError (503), PeerGoneError (410), PeerRefusedError (401, 403, TLS), and what `watch` raises.
        """
        headers = request.headers()
        connection, answer, rest = self._ask(url, request.target, headers, watch)
        keep = False
        try:
            if answer.status != 200:
                body = self._rest_of(connection, answer, rest, watch)
                keep = len(body) == answer.length and not answer.will_close
                raise _refusal(url, answer, body)
            overhead = FRAME.size * len(request.blocks)
            assert request.block_size is not None
            expected = overhead + sum(
                block_bytes(block, size, request.block_size) for block in request.blocks
            )
            if answer.length != expected:
                raise PeerError(f"{url}: sends {answer.length} bytes for {expected}")
        except BaseException:
            if keep:
                self.put_back(url, connection)
            else:
                connection.close()
            raise
        return Answer(
            self, url, connection, self._buffer(), request, size, rest, watch, not answer.will_close
        ).told(answer)

    def json(self, url: str, target: str, timeout: float) -> Any:
        """A short answer of a node. Raises PeerError."""
        watch = Patience(url, timeout)
        connection, answer, rest = self._ask(url, target, {}, watch)
        try:
            body = self._rest_of(connection, answer, rest, watch, _MAX_ANSWER)
            if answer.status != 200:
                raise _refusal(url, answer, body)
            try:
                return json.loads(body)
            except (ValueError, RecursionError):
                raise PeerError(f"{url}{target}: the answer is not JSON") from None
        finally:
            connection.close()

    def order(self, url: str, name: str, timeout: float, *, have: bool = False) -> bytes | None:
        """The recording of this name that a node has; None: it has none. `have`: we do, and it may come and take it.
        Raises PeerError."""
        watch = Patience(url, timeout)
        headers = {"Fusecache-Node": self._node}
        if have:
            headers["Fusecache-Have"] = "1"
        connection, answer, rest = self._ask(url, order_target(name), headers, watch)
        keep = False
        try:
            body = self._rest_of(connection, answer, rest, watch, MAX_ORDER)
            keep = len(body) == answer.length and not answer.will_close
            if answer.status == 404:
                return None
            if answer.status != 200:
                raise _refusal(url, answer, body)
            if len(body) != answer.length:
                raise PeerError(f"{url}: a recording of {answer.length} bytes, or broken off")
            return body
        finally:
            if keep:
                self.put_back(url, connection)
            else:
                connection.close()

    def _ask(
        self, url: str, target: str, headers: dict[str, str], watch: Watch
    ) -> tuple[_Connection, http.client.HTTPResponse, bytes]:
        for attempt in range(2):
            connection, answer, rest = self._send(url, target, headers, watch)
            if answer.status != 401 or self._signer is None or attempt:
                break
            told = answer.getheader("Fusecache-Time") or ""
            body = self._rest_of(connection, answer, rest, watch)
            connection.close()
            offset = int(told) - time.time() if told.isdecimal() and len(told) < 12 else 0.0
            if b'"reason": "clock"' not in body or abs(offset) < 1:
                raise _refusal(url, answer, body)
            with self._lock:
                fresh = url not in self._offsets
                self._offsets[url] = offset
            if fresh:
                _log.warning("%s: its clock differs from ours by %d s: set them", url, offset)
        return connection, answer, rest

    def _send(
        self, url: str, target: str, headers: dict[str, str], watch: Watch
    ) -> tuple[_Connection, http.client.HTTPResponse, bytes]:
        while True:
            connection = self._take(url)
            reused = connection.used
            lines = [f"GET {target} HTTP/1.1", f"Host: {connection.netloc}", "Accept-Encoding: identity"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            if self._signer is not None:
                offset = self._offsets.get(url, 0.0)
                lines.append(f"Authorization: {self._signer.authorization('GET', target, headers, offset)}")
            try:
                connection.sock.sendall("\r\n".join([*lines, "", ""]).encode())
                answer, rest = _head(connection, watch)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if reused and not isinstance(error, BlockingIOError | TimeoutError):
                    continue  # the node closed it while it was idle: that says nothing of this request
                raise PeerError(f"{url}: {_reason(error)}") from error
            except BaseException:
                connection.close()
                raise
            connection.used = True
            return connection, answer, rest

    def _rest_of(
        self,
        connection: _Connection,
        answer: http.client.HTTPResponse,
        rest: bytes,
        watch: Watch,
        limit: int = _ERROR_BODY,
    ) -> bytes:
        length = answer.length
        if length is None or length > limit:
            return b""
        parts, left = [rest[:length]], length - len(rest[:length])
        while left > 0:
            part = bytearray(min(left, 65536))
            got = _receive(connection, memoryview(part), watch)
            if not got:
                break
            parts.append(bytes(part[:got]))
            left -= got
        return b"".join(parts)

    def _take(self, url: str) -> _Connection:
        now = time.monotonic()
        stale, found = [], None
        with self._lock:
            idle = self._idle.get(url, [])
            while idle and found is None:
                connection = idle.pop()
                if now - connection.since < _IDLE:
                    found = connection
                else:
                    stale.append(connection)
        for connection in stale:
            connection.close()
        if found is not None:
            return found
        try:
            return _Connection(url, self._tls, self._connect_timeout, self._window)
        except ssl.SSLError as error:
            raise PeerRefusedError(f"{url}: TLS: {error.reason or error}") from error
        except TimeoutError as error:
            raise PeerSilentError(f"{url}: no connection within {self._connect_timeout:g} s") from error
        except OSError as error:
            raise PeerError(f"{url}: {_reason(error)}") from error

    def put_back(self, url: str, connection: _Connection) -> None:
        """A connection whose answer was read to its end."""
        connection.since = time.monotonic()
        with self._lock:
            idle = self._idle.setdefault(url, [])
            if not self._closed and len(idle) < _KEPT:
                idle.append(connection)
                return
        connection.close()


class Answer:
    """Blocks on their way. Iterate once; `close` in any case."""

    def __init__(
        self,
        client: PeerClient,
        url: str,
        connection: _Connection,
        buffer: memoryview,
        request: BlockRequest,
        size: int,
        begun: bytes,
        watch: Watch,
        keep: bool,
    ) -> None:
        self.stored = False
        """The node had all of it when it began to answer."""
        self._client = client
        self._url = url
        self._connection: _Connection | None = connection
        self._buffer = buffer
        self._request = request
        self._size = size
        self._begun = begun
        self._watch = watch
        self._keep = keep

    def told(self, answer: http.client.HTTPResponse) -> Answer:
        """Take over what the head says."""
        self.stored = answer.getheader("Fusecache-Stored") == "1"
        return self

    def __iter__(self) -> Iterator[int | memoryview]:
        """For each block its checksum, then its bytes in chunks; a chunk is valid until the next is asked for. Raises
        PeerError when the node breaks off, and what its watch raises."""
        connection = self._connection
        assert connection is not None
        assert self._request.block_size is not None
        buffer = self._buffer
        header = bytearray(FRAME.size)
        for block in self._request.blocks:
            # not along with the block before: its sender may have to wait for this one
            self._exactly(connection, memoryview(header))
            self._watch.begins()
            length = block_bytes(block, self._size, self._request.block_size)
            yield frame_of(header, block, length)
            left = length
            while left:
                want = min(left, _CHUNK)
                self._exactly(connection, buffer[:want])
                left -= want
                yield buffer[:want]
        if self._keep:
            self._connection = None
            self._client.put_back(self._url, connection)

    def _exactly(self, connection: _Connection, into: memoryview) -> None:
        done = 0
        if self._begun:
            done = min(len(into), len(self._begun))
            into[:done] = self._begun[:done]
            self._begun = self._begun[done:]
        while done < len(into):
            try:
                got = _receive(connection, into[done:], self._watch)
            except OSError as error:
                raise PeerError(f"{self._url}: {_reason(error)}") from error
            if not got:
                raise PeerError(f"{self._url}: broke off in the middle")
            done += got
            self._watch.came()
            self._watch.glance()

    def close(self) -> None:
        """Let the connection go: it is closed unless all of the answer was read."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _receive(connection: _Connection, into: memoryview, watch: Watch) -> int:
    """At least one byte, or 0 at the end. Raises OSError, and what `watch` raises."""
    while True:
        try:
            if connection.secure:
                return connection.sock.recv_into(into)
            return connection.sock.recv_into(into, 0, socket.MSG_WAITALL)
        except (BlockingIOError, TimeoutError):
            watch.glance()
        except InterruptedError:
            continue


def _head(connection: _Connection, watch: Watch) -> tuple[http.client.HTTPResponse, bytes]:
    """The head of the answer, and what came behind it. Interim ones only say that the node waits, too."""
    begun = bytearray()
    while True:
        if (end := begun.find(b"\r\n\r\n")) >= 0:
            answer = http.client.HTTPResponse(_Said(bytes(begun[: end + 4])), method="GET")  # type: ignore[arg-type]
            answer.begin()
            del begun[: end + 4]
            if answer.status >= 200:
                return answer, bytes(begun)
            watch.waits(age_of(answer.getheader(AGE)))
            watch.glance()
            continue
        if len(begun) > MAX_HEADER:
            raise http.client.HTTPException("the head is too long")
        try:
            part = connection.sock.recv(16384)
        except (BlockingIOError, TimeoutError):
            watch.glance()
            continue
        if not part:
            raise ConnectionResetError("the node closed the connection")
        begun += part


class _Said:
    """Bytes that http.client parses as if they came from a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, mode: str) -> Any:
        return io.BytesIO(self._data)


def _refusal(url: str, answer: http.client.HTTPResponse, body: bytes) -> PeerError:
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
        return PeerElsewhereError(message, answer.getheader("Location") or "")
    if answer.status == 503:
        return PeerBusyError(message, min(5.0, _seconds(answer.getheader("Retry-After"))))
    if answer.status == 410:
        return PeerGoneError(message)
    if answer.status in (401, 403):
        return PeerRefusedError(message)
    return PeerError(message)


def _seconds(text: str | None) -> float:
    return float(text) if text and text.isdecimal() and len(text) < 6 else 0.5


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError | BlockingIOError):
        return "no answer in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
