"""The command line's end of the control channel. Blocks its thread, with a deadline for everything."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusecache.control.protocol import (
    DEFAULT_DEADLINE,
    MAX_REPLY_BYTES,
    LineBuffer,
    LineTooLongError,
    encode_line,
)
from fusecache.errors import ControlError, DaemonUnreachableError

_RECEIVE_BYTES = 1 << 20


def call_daemon(path: Path, op: str, /, *, timeout: float = DEFAULT_DEADLINE, **args: Any) -> Any:
    """The result of an operation of the daemon that listens at `path`; blocks for at most `timeout` seconds. Raises
    DaemonUnreachableError when no daemon answers in time, ControlError when the daemon refuses, or answers by a
    stream."""
    until = time.monotonic() + timeout
    with _socket_errors_translated(path, timeout), _connect_to_daemon(path, timeout) as connection:
        connection.sendall(encode_line({**args, "op": op, "deadline": timeout}))
        line = LineReader(connection).read_line(until)
    reply = _parse_reply(line)
    if "result" not in reply:
        raise ControlError(f"{op} is answered by a stream")
    return reply["result"]


class LineReader:
    """Reads the replies on a connected socket, one line each."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = LineBuffer(MAX_REPLY_BYTES)

    def read_line(self, until: float) -> bytes:
        """The next line without its newline; empty when the daemon went away, or the line is longer than
        MAX_REPLY_BYTES. Blocks until the time `until` (of time.monotonic) at most. Raises TimeoutError and OSError."""
        with contextlib.suppress(LineTooLongError):
            while (line := self._buffer.next_line()) is None:
                left = until - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                self._connection.settimeout(left)
                part = self._connection.recv(_RECEIVE_BYTES)
                if not part:
                    break
                self._buffer.feed(part)
            else:
                return line
        return b""


@contextlib.contextmanager
def _socket_errors_translated(path: Path, timeout: float) -> Iterator[None]:
    try:
        yield
    except PermissionError:
        raise DaemonUnreachableError(f"{path}: not permitted: run this as the user who mounted it") from None
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        raise DaemonUnreachableError(f"no daemon listens at {path}") from None
    except TimeoutError:
        raise DaemonUnreachableError(f"the daemon did not answer within {timeout:g} s") from None
    except OSError as error:
        raise DaemonUnreachableError(f"{path}: {error.strerror or error}") from None


def _parse_reply(line: bytes) -> dict[str, Any]:
    """The reply, if it is not an error. Raises ControlError with the daemon's error, and DaemonUnreachableError."""
    try:
        reply = json.loads(line)
        if reply["ok"] and ("result" in reply or "item" in reply):
            return dict(reply)
        problem = str(reply["error"])
    except (ValueError, KeyError, TypeError):
        raise DaemonUnreachableError("the daemon went away before it answered") from None
    raise ControlError(problem)


class StreamedCall:
    """A request that is answered by a stream; a context manager, and an iterator over the items. It waits at most
    `timeout` seconds for each item: a daemon that has nothing to say sends an empty one. Construction and iteration
    raise DaemonUnreachableError when no daemon answers in time, ControlError when the daemon refuses."""

    def __init__(self, path: Path, op: str, /, *, timeout: float = DEFAULT_DEADLINE, **args: Any) -> None:
        self.result: Any = None
        """The result that came after the last item."""
        self._path = path
        self._timeout = timeout
        with _socket_errors_translated(path, timeout):
            self._connection = _connect_to_daemon(path, timeout)
            try:
                self._connection.sendall(encode_line({**args, "op": op, "deadline": timeout}))
            except BaseException:
                self._connection.close()
                raise
        self._reader = LineReader(self._connection)

    def __enter__(self) -> StreamedCall:
        return self

    def __exit__(self, *exc: object) -> None:
        self._connection.close()

    def __iter__(self) -> Iterator[Any]:
        while True:
            with _socket_errors_translated(self._path, self._timeout):
                line = self._reader.read_line(time.monotonic() + self._timeout)
            reply = _parse_reply(line)
            if "result" in reply:
                self.result = reply["result"]
                return
            yield reply["item"]

    def request_end(self) -> None:
        """Ask for the end; the items until now still come."""
        with _socket_errors_translated(self._path, self._timeout):
            self._connection.sendall(b"{}\n")


def _connect_to_daemon(path: Path, timeout: float) -> socket.socket:
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        connection.connect(f"/proc/self/fd/{directory}/{path.name}")
    except BaseException:
        connection.close()
        raise
    finally:
        os.close(directory)
    return connection
