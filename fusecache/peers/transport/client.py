"""The client's end of the exchange: blocking requests of worker threads, over connections that are kept and used
again."""

from __future__ import annotations

import json
import logging
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any

import h11

from fusecache.blocks import block_length
from fusecache.peers.errors import (
    PeerBadBlockError,
    PeerBusyError,
    PeerConnectTimeoutError,
    PeerError,
    PeerMissError,
    PeerRedirectError,
    PeerRefusedError,
    PeerVersionGoneError,
)
from fusecache.peers.transport.auth import RequestSigner
from fusecache.peers.transport.connection import ClientConnection, ResponseHead, poll_observer
from fusecache.peers.transport.observer import BlockReceiver, RequestTimeout, TransferObserver
from fusecache.peers.transport.wire import (
    FRAME_HEADER,
    BlockRequest,
    parse_frame_checksum,
    profile_target,
)

_log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_IDLE_TIMEOUT = 20.0
"""Seconds that an unused connection is kept."""
_MAX_IDLE_CONNECTIONS = 32
"""Unused connections kept per node."""
_MAX_ERROR_BODY = 16 * 1024
_MAX_JSON_BODY = 64 << 20
"""Bytes of a JSON answer."""


class PeerClient:
    """Asks other nodes for blocks. Thread-safe: `_lock` guards the idle connections and the clock offsets, and is a
    leaf.

    A connection is in use, by one thread, from `_acquire_connection` on. It becomes idle when all of an answer was read
    from it, and is closed when anything else happens, after _IDLE_TIMEOUT, or with the client.
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
        """`own_name` is this node's; `connect_timeout` is in seconds; `receive_window` bytes at most are on their way
        on one connection (0: as many as the kernel finds right): many nodes send at once, and what the last switch
        can't hold is sent twice."""
        self._own_name = own_name
        self._signer = signer
        self._tls = tls
        self._connect_timeout = connect_timeout
        self._receive_window = receive_window
        self._lock = threading.Lock()
        self._idle_connections: dict[str, list[ClientConnection]] = {}
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
        """Ask the node at `url` for blocks of an object of `object_size` bytes. Blocks until the answer begins.

        Raises PeerError, PeerConnectTimeoutError (no connection), PeerMissError (404, 421, 504), PeerRedirectError
        (307), PeerBusyError (503), PeerVersionGoneError (410), PeerRefusedError (401, 403, TLS), and
        TransferAbandonedError when the observer says so."""
        connection, head = self._send_with_clock_retry(url, request.target, request.headers(), observer)
        keep = False
        try:
            if head.status != 200:
                body = self._read_body(connection, head, observer)
                keep = len(body) == head.content_length and head.keep_alive
                raise _refusal_error(url, head, body)
            overhead = FRAME_HEADER.size * len(request.blocks)
            assert request.block_size is not None
            expected = overhead + sum(
                block_length(block, object_size, request.block_size) for block in request.blocks
            )
            if head.content_length != expected:
                raise PeerError(f"{url}: sends {head.content_length} bytes for {expected}")
        except BaseException:
            if keep:
                self.release_connection(url, connection)
            else:
                connection.close()
            raise
        return IncomingBlocks(
            self, url, connection, head, self._thread_buffer(), request, object_size, observer
        )

    def request_json(self, url: str, target: str, timeout: float) -> Any:
        """A short answer of a node. Blocks for `timeout` seconds at most once it is connected. Raises PeerError."""
        observer = RequestTimeout(timeout)
        connection, head = self._send_with_clock_retry(url, target, {}, observer)
        try:
            body = self._read_body(connection, head, observer, _MAX_JSON_BODY)
            if head.status != 200:
                raise _refusal_error(url, head, body)
            try:
                return json.loads(body)
            except (ValueError, RecursionError):
                raise PeerError(f"{url}{target}: the answer is not JSON") from None
        finally:
            connection.close()

    def request_profile(
        self, url: str, name: str, timeout: float, *, max_bytes: int, has_profile: bool = False
    ) -> bytes | None:
        """The access profile of this name that a node has; None: it has none. `has_profile` tells the node that we have
        one, which it may come and fetch. Blocks for `timeout` seconds at most once it is connected. Raises
        PeerError, also for more than `max_bytes`."""
        observer = RequestTimeout(timeout)
        headers = {"Fusecache-Node": self._own_name}
        if has_profile:
            headers["Fusecache-Have"] = "1"
        connection, head = self._send_with_clock_retry(url, profile_target(name), headers, observer)
        keep = False
        try:
            body = self._read_body(connection, head, observer, max_bytes)
            keep = len(body) == head.content_length and head.keep_alive
            if head.status == 404:
                return None
            if head.status != 200:
                raise _refusal_error(url, head, body)
            if len(body) != head.content_length:
                raise PeerError(f"{url}: a profile of {head.content_length} bytes, or broken off")
            return body
        finally:
            if keep:
                self.release_connection(url, connection)
            else:
                connection.close()

    def _send_with_clock_retry(
        self, url: str, target: str, headers: Mapping[str, str], observer: TransferObserver
    ) -> tuple[ClientConnection, ResponseHead]:
        """Send a request, and once more if the node's clock turns out to differ from ours."""
        for attempt in range(2):
            connection, head = self._send_request(url, target, headers, observer)
            if head.status != 401 or self._signer is None or attempt:
                break
            node_time = head.headers.get("fusecache-time", "")
            body = self._read_body(connection, head, observer)
            connection.close()
            offset = int(node_time) - time.time() if node_time.isdecimal() and len(node_time) < 12 else 0.0
            if b'"reason": "clock"' not in body or abs(offset) < 1:
                raise _refusal_error(url, head, body)
            with self._lock:
                fresh = url not in self._clock_offsets
                self._clock_offsets[url] = offset
            if fresh:
                _log.warning("%s: its clock differs from ours by %d s: set them", url, offset)
        return connection, head

    def _send_request(
        self, url: str, target: str, headers: Mapping[str, str], observer: TransferObserver
    ) -> tuple[ClientConnection, ResponseHead]:
        """Send a request over a kept connection, or a new one; returns when the head of the answer has come."""
        while True:
            connection = self._acquire_connection(url)
            was_used = connection.was_used
            fields = dict(headers)
            if self._signer is not None:
                offset = self._clock_offsets.get(url, 0.0)
                fields["Authorization"] = self._signer.authorization_header("GET", target, headers, offset)
            try:
                return connection, connection.send_request(target, fields, observer)
            except (OSError, h11.RemoteProtocolError) as error:
                connection.close()
                if was_used and not isinstance(error, BlockingIOError | TimeoutError):
                    continue  # the node closed it while it was idle: that says nothing of this request
                raise PeerError(f"{url}: {_describe_error(error)}") from error
            except BaseException:
                connection.close()
                raise

    def _read_body(
        self,
        connection: ClientConnection,
        head: ResponseHead,
        observer: TransferObserver,
        limit: int = _MAX_ERROR_BODY,
    ) -> bytes:
        """A short body, as far as it came; empty if it is longer than `limit` bytes."""
        length = head.content_length
        if length is None or length > limit:
            return b""
        parts = [head.received_ahead[:length]]
        left = length - len(parts[0])
        while left > 0:
            part = bytearray(min(left, 65536))
            got = connection.receive_some(memoryview(part), observer)
            if not got:
                break
            parts.append(bytes(part[:got]))
            left -= got
        return b"".join(parts)

    def _acquire_connection(self, url: str) -> ClientConnection:
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
            return ClientConnection(url, self._tls, self._connect_timeout, self._receive_window)
        except ssl.SSLError as error:
            raise PeerRefusedError(f"{url}: TLS: {error.reason or error}") from error
        except TimeoutError as error:
            raise PeerConnectTimeoutError(
                f"{url}: no connection within {self._connect_timeout:g} s"
            ) from error
        except OSError as error:
            raise PeerError(f"{url}: {_describe_error(error)}") from error

    def release_connection(self, url: str, connection: ClientConnection) -> None:
        """Keep a connection whose answer was read to its end."""
        connection.mark_idle()
        with self._lock:
            idle = self._idle_connections.setdefault(url, [])
            if not self._is_closed and len(idle) < _MAX_IDLE_CONNECTIONS:
                idle.append(connection)
                return
        connection.close()


class IncomingBlocks:
    """The blocks of one answer, on their way. Used by one thread. `receive_into` may be called once, and gives the
    connection back to the client when it has received everything; `close` closes the connection otherwise."""

    def __init__(
        self,
        client: PeerClient,
        url: str,
        connection: ClientConnection,
        head: ResponseHead,
        buffer: memoryview,
        request: BlockRequest,
        object_size: int,
        observer: TransferObserver,
    ) -> None:
        self.all_stored = head.headers.get("fusecache-stored") == "1"
        """The node had all blocks when it began to answer."""
        self._client = client
        self._url = url
        self._connection: ClientConnection | None = connection
        self._buffer = buffer
        self._request = request
        self._object_size = object_size
        self._received_ahead = head.received_ahead
        self._observer = observer
        self._keep_alive = head.keep_alive

    def receive_into(self, receiver: BlockReceiver) -> None:
        """Receive all blocks. Blocks. Raises PeerError when the node breaks off, PeerBadBlockError when a block does
        not have its checksum, TransferAbandonedError when the observer says so, and what the receiver raises."""
        connection = self._connection
        assert connection is not None
        assert self._request.block_size is not None
        header = bytearray(FRAME_HEADER.size)
        for block in self._request.blocks:
            # not along with the block before: its sender may have to wait for this one
            self._receive_exactly(connection, memoryview(header))
            length = block_length(block, self._object_size, self._request.block_size)
            receiver.begin_block(parse_frame_checksum(header, block, length))
            left = length
            while left:
                chunk = self._buffer[: min(left, len(self._buffer))]
                self._receive_exactly(connection, chunk)
                left -= len(chunk)
                receiver.write(chunk)
            if not receiver.end_block():
                raise PeerBadBlockError(f"{self._url}: sent wrong bytes")
        if self._keep_alive:
            self._connection = None
            self._client.release_connection(self._url, connection)

    def _receive_exactly(self, connection: ClientConnection, into: memoryview) -> None:
        done = 0
        if self._received_ahead:
            done = min(len(into), len(self._received_ahead))
            into[:done] = self._received_ahead[:done]
            self._received_ahead = self._received_ahead[done:]
        while done < len(into):
            try:
                got = connection.receive_some(into[done:], self._observer)
            except OSError as error:
                raise PeerError(f"{self._url}: {_describe_error(error)}") from error
            if not got:
                raise PeerError(f"{self._url}: broke off in the middle")
            done += got
            self._observer.bytes_arrived()
            poll_observer(self._url, self._observer)

    def close(self) -> None:
        """Let the connection go: it is closed unless all of the answer was read."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _refusal_error(url: str, head: ResponseHead, body: bytes) -> PeerError:
    try:
        found = json.loads(body)
        text = str(found.get("error", ""))[:300]
    except (ValueError, AttributeError, RecursionError):
        text = ""
    text = "".join(letter if letter.isprintable() else "?" for letter in text) or f"answered {head.status}"
    message = f"{url}: {text}"
    if head.status in (404, 421, 504):
        return PeerMissError(message)
    if head.status == 307:
        return PeerRedirectError(message, head.headers.get("location", ""))
    if head.status == 503:
        return PeerBusyError(message, min(5.0, _parse_retry_after(head.headers.get("retry-after"))))
    if head.status == 410:
        return PeerVersionGoneError(message)
    if head.status in (401, 403):
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
