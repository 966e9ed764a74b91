"""A TCP relay in front of the S3 server that counts LIST and HEAD requests on the wire.

An independent witness: it does not trust the counters of the program under test.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

CHUNK = 1 << 18
MARK = b"list-type=2"  # in the request line of ListObjectsV2, and nowhere else in a client's stream of GETs
MARKS = {
    "lists": MARK,
    "heads": b"HEAD /",
    "prefixes": b"prefix=",
}  # the last: in LIST requests of any version


@dataclass
class Relay:
    """The relay's address, and what it has seen so far."""

    endpoint: str
    lists: int = 0
    heads: int = 0
    prefixes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def metadata(self) -> int:
        """Requests that ask for names or attributes: LIST of any version, and HEAD."""
        return self.prefixes + self.heads

    def count(self, what: str, number: int) -> None:
        """Add requests, by the names of MARKS."""
        with self._lock:
            setattr(self, what, getattr(self, what) + number)


@contextlib.contextmanager
def counting_relay(endpoint: str) -> Iterator[Relay]:
    """Relay connections to `endpoint` for the length of the block."""
    target = urlsplit(endpoint)
    address = (target.hostname or "127.0.0.1", target.port or 80)
    listener = socket.create_server(("127.0.0.1", 0))
    relay = Relay(f"http://127.0.0.1:{listener.getsockname()[1]}")
    threading.Thread(target=_accept, args=(listener, address, relay), daemon=True).start()
    try:
        yield relay
    finally:
        # shutdown wakes the accept, close alone does not.
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _accept(listener: socket.socket, address: tuple[str, int], relay: Relay) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        try:
            server = socket.create_connection(address, timeout=10)
        except OSError:
            client.close()
            continue
        server.settimeout(None)
        for source, sink, counted in ((client, server, relay), (server, client, None)):
            threading.Thread(target=_pump, args=(source, sink, counted), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, relay: Relay | None) -> None:
    tails = dict.fromkeys(MARKS, b"")
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK):
            if relay is not None:
                for what, mark in MARKS.items():
                    # A mark that lies across two chunks is counted with the second one, and only there.
                    seen = tails[what] + data
                    relay.count(what, seen.count(mark))
                    tails[what] = seen[-(len(mark) - 1) :]
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
