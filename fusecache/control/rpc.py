"""The control channel between the daemon of a mount and the command line.

Newline-delimited JSON over a unix stream socket: a request {"op": "status", ...} is answered by
{"ok": true, "result": ...} or {"ok": false, "error": "one line"}; a connection may carry several, one at a
time. Only root and the daemon's own user may connect (mode 0600, directory 0700, and SO_PEERCRED). A request
is at most MAX_REQUEST bytes and is answered within its deadline; a broken one ends its connection and nothing
else.

Some requests are answered by a stream: {"ok": true, "item": ...} any number of times, HEARTBEAT seconds apart at
most, then the result. It ends when the client sends a line, and at once when it goes away or takes no item for
STREAM_TIMEOUT seconds.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import trio

from fusecache.control.mounts import make_private_directory
from fusecache.errors import ControlError, DaemonUnreachableError, FusecacheError, MountError

_log = logging.getLogger(__name__)

Handler = Callable[[dict[str, Any]], Awaitable[object]]
"""Returns what JSON can say, or a Stream."""

MAX_REQUEST_BYTES = 64 << 10
MAX_REPLY_BYTES = 256 << 20
DEFAULT_DEADLINE = 30.0
MAX_DEADLINE = 3600.0
IDLE_TIMEOUT = 60.0
"""Seconds that a connection may wait with its next request, or take to read a reply."""
MAX_CONNECTIONS = 64
MAX_ITEM_INTERVAL = 2.0
STREAM_TIMEOUT = 10.0
CLOSE_TIMEOUT = 10.0


@runtime_checkable
class ReplyStream(Protocol):
    """An answer that goes on. `close` is called exactly once, also when the client is gone."""

    async def next_item(self, stop: trio.Event) -> object | None:
        """The next item, within HEARTBEAT seconds; None: it is over. `stop`: the client wants the end."""

    def result(self) -> object:
        """What is said at the end."""

    async def close(self) -> None:
        """Give back what it holds; is not cancelled for CLOSE_TIMEOUT seconds."""


async def serve_requests(
    path: Path,
    handlers: Mapping[str, Handler],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests on a socket at `path` until cancelled; `started()` when it listens. A handler gets the
    request; a FusecacheError or ValueError of it becomes the error line. A stale socket is replaced. Raises
    MountError when `path` can't be used or another daemon answers there."""
    make_private_directory(path.parent)
    with _listening_socket(path) as listening:
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        connections = trio.Semaphore(MAX_CONNECTIONS)
        await trio.serve_listeners(
            functools.partial(_serve_connection, handlers=handlers, connections=connections),
            [listener],
            task_status=_ListeningStatus(task_status),
        )


class _ListeningStatus:
    """serve_listeners() reports its listeners; our caller only wants to know that it listens."""

    def __init__(self, task_status: trio.TaskStatus[None]) -> None:
        self._task_status = task_status

    def started(self, value: object = None) -> None:
        self._task_status.started()


@contextlib.contextmanager
def _listening_socket(path: Path) -> Iterator[socket.socket]:
    """A listening socket that appears at `path` at once and ready, and is removed if it is still ours."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    temporary = f".{path.name}.{os.getpid()}"
    inode = 0
    try:
        if _is_answering(directory, path.name):
            raise MountError(f"another daemon answers at {path}")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
        # Through the descriptor: a socket address holds only 107 bytes, a path may be longer.
        before = os.umask(0o177)
        try:
            listening.bind(f"/proc/self/fd/{directory}/{temporary}")
        finally:
            os.umask(before)
        listening.listen(MAX_CONNECTIONS)
        os.rename(temporary, path.name, src_dir_fd=directory, dst_dir_fd=directory)
        inode = os.stat(path.name, dir_fd=directory, follow_symlinks=False).st_ino
        yield listening
    except OSError as error:
        raise MountError(f"control socket {path}: {error.strerror}") from error
    finally:
        listening.close()
        with contextlib.suppress(OSError):
            if inode and os.stat(path.name, dir_fd=directory, follow_symlinks=False).st_ino == inode:
                os.unlink(path.name, dir_fd=directory)
        os.close(directory)


def _is_answering(directory: int, name: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(f"/proc/self/fd/{directory}/{name}")
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True


async def _serve_connection(
    stream: trio.SocketStream, *, handlers: Mapping[str, Handler], connections: trio.Semaphore
) -> None:
    try:
        connections.acquire_nowait()
    except trio.WouldBlock:
        await stream.aclose()
        return
    try:
        async with stream:
            if not _is_permitted(stream):
                _log.warning("control: refused a connection of another user")
                return
            await _answer_requests(stream, handlers)
    except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
        _log.debug("control: a client went away")
    finally:
        connections.release()


def _is_permitted(stream: trio.SocketStream) -> bool:
    credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return uid in (0, os.geteuid())


async def _answer_requests(stream: trio.SocketStream, handlers: Mapping[str, Handler]) -> None:
    buffer = bytearray()
    while True:
        with trio.fail_after(IDLE_TIMEOUT):
            while (end := buffer.find(b"\n")) < 0 and len(buffer) <= MAX_REQUEST_BYTES:
                received = await stream.receive_some(MAX_REQUEST_BYTES)
                if not received:
                    return
                buffer += received
        if end < 0 or end > MAX_REQUEST_BYTES:
            await _send_bytes(
                stream,
                _encode_line({"ok": False, "error": f"the request is longer than {MAX_REQUEST_BYTES} bytes"}),
            )
            return
        line = bytes(buffer[:end])
        del buffer[: end + 1]
        answer = await _answer_request(line, handlers)
        found = answer.get("result")
        if not isinstance(found, ReplyStream):
            await _send_bytes(stream, _encode_line(answer))
        elif not await _send_stream(stream, found):
            return


def _encode_line(reply: dict[str, object]) -> bytes:
    return json.dumps(reply, default=str).encode() + b"\n"


async def _send_bytes(stream: trio.SocketStream, data: bytes, timeout: float = IDLE_TIMEOUT) -> None:
    with trio.fail_after(timeout):
        await stream.send_all(data)


async def _send_stream(stream: trio.SocketStream, source: ReplyStream) -> bool:
    """Send all of it; returns whether the client is still there."""
    stop = trio.Event()
    gone = False
    try:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                nonlocal gone
                try:
                    said = await stream.receive_some(MAX_REQUEST_BYTES)
                except trio.BrokenResourceError:
                    said = b""
                if said:
                    stop.set()
                else:
                    gone = True
                    nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            try:
                while (item := await source.next_item(stop)) is not None:
                    # an item may be large, and the event loop has others to serve
                    data = await trio.to_thread.run_sync(_encode_line, {"ok": True, "item": item})
                    await _send_bytes(stream, data, STREAM_TIMEOUT)
            except (trio.BrokenResourceError, trio.TooSlowError):
                gone = True
            except Exception:
                _log.exception("control: a stream failed")
                gone = True
            nursery.cancel_scope.cancel()
        if not gone:
            await _send_bytes(stream, _encode_line({"ok": True, "result": source.result()}), STREAM_TIMEOUT)
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_TIMEOUT):
            await source.close()
    return not gone


async def _answer_request(line: bytes, handlers: Mapping[str, Handler]) -> dict[str, object]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        return {"ok": False, "error": "the request is not JSON"}
    if not isinstance(request, dict) or not isinstance(request.get("op"), str):
        return {"ok": False, "error": "the request has no op"}
    op = request["op"]
    handler = handlers.get(op)
    if handler is None:
        return {"ok": False, "error": f"this daemon can't do {op!r}: it is of another version"}
    try:
        with trio.fail_after(_request_deadline(request)):
            return {"ok": True, "result": await handler(request)}
    except trio.TooSlowError:
        return {"ok": False, "error": f"{op}: not done within {_request_deadline(request):g} s"}
    except (FusecacheError, ValueError) as error:
        return {"ok": False, "error": " ".join(str(error).split()) or type(error).__name__}
    except Exception as error:
        _log.exception("control: %s failed", op)
        return {"ok": False, "error": f"{op} failed inside the daemon ({type(error).__name__}): see its log"}


def _request_deadline(request: dict[str, Any]) -> float:
    wanted = request.get("deadline", DEFAULT_DEADLINE)
    if isinstance(wanted, bool) or not isinstance(wanted, int | float) or not 0 < wanted <= MAX_DEADLINE:
        return DEFAULT_DEADLINE
    return float(wanted)


def call_daemon(path: Path, op: str, /, *, timeout: float = DEFAULT_DEADLINE, **args: Any) -> Any:
    """Ask the daemon that listens at `path`; blocks for at most `timeout` seconds. Raises
    DaemonUnreachableError when nobody answers in time, ControlError when the daemon says no."""
    until = time.monotonic() + timeout
    with _socket_errors_translated(path, timeout), _connect_to_daemon(path, timeout) as connection:
        connection.sendall(_encode_line({**args, "op": op, "deadline": timeout}))
        line = _receive_line(connection, until)
    reply = _parse_reply(line)
    if "result" not in reply:
        raise ControlError(f"{op} is answered by a stream")
    return reply["result"]


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
    """A reply that says yes."""
    try:
        reply = json.loads(line)
        if reply["ok"] and ("result" in reply or "item" in reply):
            return dict(reply)
        problem = str(reply["error"])
    except (ValueError, KeyError, TypeError):
        raise DaemonUnreachableError("the daemon went away before it answered") from None
    raise ControlError(problem)


class StreamedCall:
    """A request that is answered by a stream; a context manager, and an iterator over the items. An item is at most
    `timeout` seconds away: the daemon sends empty ones rather than none. Raises what `call` raises."""

    def __init__(self, path: Path, op: str, /, *, timeout: float = DEFAULT_DEADLINE, **args: Any) -> None:
        self.result: Any = None
        """What was said at the end."""
        self._path = path
        self._timeout = timeout
        self._buffer = bytearray()
        with _socket_errors_translated(path, timeout):
            self._connection = _connect_to_daemon(path, timeout)
            try:
                self._connection.sendall(_encode_line({**args, "op": op, "deadline": timeout}))
            except BaseException:
                self._connection.close()
                raise

    def __enter__(self) -> StreamedCall:
        return self

    def __exit__(self, *exc: object) -> None:
        self._connection.close()

    def __iter__(self) -> Iterator[Any]:
        while True:
            reply = _parse_reply(self._receive_line())
            if "result" in reply:
                self.result = reply["result"]
                return
            yield reply["item"]

    def _receive_line(self) -> bytes:
        with _socket_errors_translated(self._path, self._timeout):
            until = time.monotonic() + self._timeout
            while (end := self._buffer.find(b"\n")) < 0 and len(self._buffer) <= MAX_REPLY_BYTES:
                self._connection.settimeout(max(0.001, until - time.monotonic()))
                part = self._connection.recv(1 << 20)
                if not part:
                    break
                self._buffer += part
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        return line

    def request_end(self) -> None:
        """Ask for the end; what happened until now still comes."""
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


def _receive_line(connection: socket.socket, until: float) -> bytes:
    parts: list[bytes] = []
    size = 0
    while size <= MAX_REPLY_BYTES:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        part = connection.recv(1 << 20)
        parts.append(part)
        size += len(part)
        if not part or b"\n" in part:
            break
    received = b"".join(parts)
    return received[: received.find(b"\n") + 1]  # a stream may have gone on behind it
