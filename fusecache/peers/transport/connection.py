"""The client's connection to another node: a blocking socket, and the heads of its answers by h11.

SO_RCVTIMEO ends each wait after a moment, so that the observer of a request can be polled. h11 sees heads only: a body
is received with one recv(MSG_WAITALL) per chunk, straight into the caller's buffer. So each request has an
h11.Connection of its own, and the socket is used again when all of the body was read.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11

from fusecache.peers.errors import TransferAbandonedError
from fusecache.peers.transport.observer import TransferObserver
from fusecache.peers.transport.wire import AGE_HEADER, MAX_HEAD_BYTES, parse_age

_POLL_INTERVAL = 0.5
"""Seconds between polls of the observer while nothing comes."""
_SEND_TIMEOUT = 5
"""Seconds in which a request's head has to find room in the socket."""
_SO_RCVBUFFORCE = 33
"""socket(7); Python 3.11 has no name for it."""


@dataclass(frozen=True)
class ResponseHead:
    """The head of an answer."""

    status: int
    headers: Mapping[str, str]
    """By names in lower case."""
    received_ahead: bytes
    """The beginning of the body, which came with the head."""
    keep_alive: bool
    """The node leaves the connection open when the body is through."""

    @property
    def content_length(self) -> int | None:
        """Bytes of the body; None: the head does not say."""
        text = self.headers.get("content-length")
        return None if text is None else int(text)


class ClientConnection:
    """A connection to one node; used by one request, and so by one thread, at a time."""

    def __init__(self, url: str, tls: ssl.SSLContext | None, timeout: float, receive_window: int) -> None:
        """Connects: blocks for `timeout` seconds at most. `receive_window` bytes at most are on their way here at a
        time; 0: as many as the kernel finds right. Raises OSError."""
        parts = urlsplit(url)
        self._url = url
        self._host = parts.netloc
        sock = _connect_socket(parts.hostname or "", parts.port or 0, timeout, receive_window)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._is_tls = parts.scheme == "https"
            if self._is_tls:
                sock = (tls or ssl.create_default_context()).wrap_socket(sock)
                sock.settimeout(_POLL_INTERVAL)
            else:
                sock.settimeout(None)
                interval = struct.pack("ll", 0, int(_POLL_INTERVAL * 1e6))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_TIMEOUT, 0))
        except BaseException:
            sock.close()
            raise
        self._sock = sock
        self.was_used = False
        """An answer was received here."""
        self.idle_since = 0.0
        """When the last request was through, as time.monotonic()."""

    def mark_idle(self) -> None:
        """All of an answer was read: the connection waits for the next request."""
        self.idle_since = time.monotonic()

    def close(self) -> None:
        """Close the socket; may be called again."""
        with contextlib.suppress(OSError):
            self._sock.close()

    def send_request(
        self, target: str, headers: Mapping[str, str], observer: TransferObserver
    ) -> ResponseHead:
        """Send a GET, and wait for the head of its final answer; interim answers only say that the node waits, too.
        Blocks. Raises OSError, h11.RemoteProtocolError and TransferAbandonedError."""
        parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        fields = [("Host", self._host), ("Accept-Encoding", "identity"), *headers.items()]
        data = parser.send(h11.Request(method="GET", target=target, headers=fields))
        self._sock.sendall((data or b"") + (parser.send(h11.EndOfMessage()) or b""))
        while True:
            event = parser.next_event()
            if isinstance(event, h11.InformationalResponse):
                observer.node_waiting(parse_age(_header_fields(event).get(AGE_HEADER.lower())))
                self._poll(observer)
            elif isinstance(event, h11.Response):
                self.was_used = True
                found = _header_fields(event)
                keep_alive = event.http_version == b"1.1" and found.get("connection", "").lower() != "close"
                return ResponseHead(event.status_code, found, parser.trailing_data[0], keep_alive)
            elif event is h11.NEED_DATA:
                self._feed(parser, observer)
            else:
                raise ConnectionResetError("the node closed the connection")

    def _feed(self, parser: h11.Connection, observer: TransferObserver) -> None:
        try:
            part = self._sock.recv(MAX_HEAD_BYTES)
        except (BlockingIOError, TimeoutError):
            self._poll(observer)
            return
        if not part:
            raise ConnectionResetError("the node closed the connection")
        parser.receive_data(part)

    def receive_some(self, into: memoryview, observer: TransferObserver) -> int:
        """Receive bytes of a body: at least one, or 0 at the end. Blocks. Raises OSError and TransferAbandonedError."""
        while True:
            try:
                if self._is_tls:
                    return self._sock.recv_into(into)
                return self._sock.recv_into(into, 0, socket.MSG_WAITALL)
            except (BlockingIOError, TimeoutError):
                self._poll(observer)
            except InterruptedError:
                continue

    def _poll(self, observer: TransferObserver) -> None:
        poll_observer(self._url, observer)


def poll_observer(url: str, observer: TransferObserver) -> None:
    """Raise TransferAbandonedError if the observer of a request to the node at `url` finds it not worth waiting for."""
    reason = observer.poll()
    if reason is not None:
        raise TransferAbandonedError(f"{url}: {reason}")


def _header_fields(event: h11.Response | h11.InformationalResponse) -> dict[str, str]:
    return {name.decode("ascii"): value.decode("latin-1") for name, value in event.headers}


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
