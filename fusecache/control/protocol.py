"""The control channel between the daemon of a mount and the command line: newline-delimited JSON over a unix stream
socket. Pure; standard library only.

A request {"op": "status", ...} is answered by {"ok": true, "result": ...} or {"ok": false, "error": "one line"}. A
connection may carry several requests, one at a time. A request is at most MAX_REQUEST_BYTES and is answered within its
"deadline", in seconds; a broken one ends its connection and nothing else.

Some requests are answered by a stream: {"ok": true, "item": ...} any number of times, MAX_ITEM_INTERVAL seconds apart
at most, then the result. It ends when the client sends a line, and at once when the client goes away or takes no item
for STREAM_TIMEOUT seconds.
"""

from __future__ import annotations

import json

MAX_REQUEST_BYTES = 64 << 10
MAX_REPLY_BYTES = 256 << 20
DEFAULT_DEADLINE = 30.0
"""Seconds."""
MAX_ITEM_INTERVAL = 2.0
STREAM_TIMEOUT = 10.0


class LineTooLongError(ValueError):
    """A line is longer than the buffer allows."""


class LineBuffer:
    """Turns received bytes into lines of at most `max_bytes`, newline not counted. Used by one thread or task."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._searched = 0
        """Bytes of the buffer that hold no newline: a reply may come in thousands of parts."""

    def feed(self, data: bytes) -> None:
        """Add received bytes."""
        self._buffer += data

    def next_line(self) -> bytes | None:
        """The next whole line, without its newline; None: more bytes are needed. Raises LineTooLongError."""
        end = self._buffer.find(b"\n", self._searched)
        if end > self._max_bytes or (end < 0 and len(self._buffer) > self._max_bytes):
            raise LineTooLongError(f"longer than {self._max_bytes} bytes")
        if end < 0:
            self._searched = len(self._buffer)
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return line


def encode_line(message: object) -> bytes:
    """A request or a reply as one line; anything that JSON does not know is written as its `str`."""
    return json.dumps(message, default=str).encode() + b"\n"
