"""The control channel between the daemon of a mount and the command line.

Newline-delimited JSON over a unix stream socket: a request {"op": "status", ...} is answered by
{"ok": true, "result": ...} or {"ok": false, "error": "one line"}; a connection may carry several, one at a
time. Only root and the daemon's own user may connect (mode 0600, directory 0700, and SO_PEERCRED). A request
is at most MAX_REQUEST bytes and is answered within its deadline; a broken one ends its connection and nothing
else.
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
from typing import Any

import trio

from fusecache.errors import ControlError, DaemonUnreachableError, FusecacheError, MountError
from fusecache.mounts import private_directory

_log = logging.getLogger(__name__)

Handler = Callable[[dict[str, Any]], Awaitable[object]]

MAX_REQUEST = 64 << 10
MAX_REPLY = 256 << 20
DEFAULT_DEADLINE = 30.0
MAX_DEADLINE = 3600.0
IDLE_TIMEOUT = 60.0
"""Seconds that a connection may wait with its next request, or take to read a reply."""
MAX_CONNECTIONS = 64


async def serve(
    path: Path,
    handlers: Mapping[str, Handler],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests on a socket at `path` until cancelled; `started()` when it listens. A handler gets the
    request; a FusecacheError or ValueError of it becomes the error line. A stale socket is replaced. Raises
    MountError when `path` can't be used or another daemon answers there."""
    private_directory(path.parent)
    with _bound(path) as listening:
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        connections = trio.Semaphore(MAX_CONNECTIONS)
        await trio.serve_listeners(
            functools.partial(_serve_one, handlers=handlers, connections=connections),
            [listener],
            task_status=_Started(task_status),
        )


class _Started:
    """serve_listeners() reports its listeners; our caller only wants to know that it listens."""

    def __init__(self, task_status: trio.TaskStatus[None]) -> None:
        self._task_status = task_status

    def started(self, value: object = None) -> None:
        self._task_status.started()


@contextlib.contextmanager
def _bound(path: Path) -> Iterator[socket.socket]:
    """A listening socket that appears at `path` at once and ready, and is removed if it is still ours."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    temporary = f".{path.name}.{os.getpid()}"
    inode = 0
    try:
        if _answers(directory, path.name):
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


def _answers(directory: int, name: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(f"/proc/self/fd/{directory}/{name}")
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True


async def _serve_one(
    stream: trio.SocketStream, *, handlers: Mapping[str, Handler], connections: trio.Semaphore
) -> None:
    try:
        connections.acquire_nowait()
    except trio.WouldBlock:
        await stream.aclose()
        return
    try:
        async with stream:
            if not _permitted(stream):
                _log.warning("control: refused a connection of another user")
                return
            await _converse(stream, handlers)
    except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
        _log.debug("control: a client went away")
    finally:
        connections.release()


def _permitted(stream: trio.SocketStream) -> bool:
    credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return uid in (0, os.geteuid())


async def _converse(stream: trio.SocketStream, handlers: Mapping[str, Handler]) -> None:
    buffer = bytearray()
    while True:
        with trio.fail_after(IDLE_TIMEOUT):
            while (end := buffer.find(b"\n")) < 0 and len(buffer) <= MAX_REQUEST:
                received = await stream.receive_some(MAX_REQUEST)
                if not received:
                    return
                buffer += received
        if end < 0 or end > MAX_REQUEST:
            await _send(stream, {"ok": False, "error": f"the request is longer than {MAX_REQUEST} bytes"})
            return
        line = bytes(buffer[:end])
        del buffer[: end + 1]
        await _send(stream, await _answer(line, handlers))


async def _send(stream: trio.SocketStream, reply: dict[str, object]) -> None:
    with trio.fail_after(IDLE_TIMEOUT):
        await stream.send_all(json.dumps(reply, default=str).encode() + b"\n")


async def _answer(line: bytes, handlers: Mapping[str, Handler]) -> dict[str, object]:
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
        with trio.fail_after(_deadline(request)):
            return {"ok": True, "result": await handler(request)}
    except trio.TooSlowError:
        return {"ok": False, "error": f"{op}: not done within {_deadline(request):g} s"}
    except (FusecacheError, ValueError) as error:
        return {"ok": False, "error": " ".join(str(error).split()) or type(error).__name__}
    except Exception as error:
        _log.exception("control: %s failed", op)
        return {"ok": False, "error": f"{op} failed inside the daemon ({type(error).__name__}): see its log"}


def _deadline(request: dict[str, Any]) -> float:
    wanted = request.get("deadline", DEFAULT_DEADLINE)
    if isinstance(wanted, bool) or not isinstance(wanted, int | float) or not 0 < wanted <= MAX_DEADLINE:
        return DEFAULT_DEADLINE
    return float(wanted)


def call(path: Path, op: str, /, *, timeout: float = DEFAULT_DEADLINE, **args: Any) -> Any:
    """Ask the daemon that listens at `path`; blocks for at most `timeout` seconds. Raises
    DaemonUnreachableError when nobody answers in time, ControlError when the daemon says no."""
    until = time.monotonic() + timeout
    message = json.dumps({**args, "op": op, "deadline": timeout}).encode() + b"\n"
    try:
        with _connect(path, timeout) as connection:
            connection.sendall(message)
            line = _receive_line(connection, until)
    except PermissionError:
        raise DaemonUnreachableError(f"{path}: not permitted: run this as the user who mounted it") from None
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        raise DaemonUnreachableError(f"no daemon listens at {path}") from None
    except TimeoutError:
        raise DaemonUnreachableError(f"the daemon did not answer within {timeout:g} s") from None
    except OSError as error:
        raise DaemonUnreachableError(f"{path}: {error.strerror or error}") from None
    try:
        reply = json.loads(line)
        if reply["ok"]:
            return reply["result"]
        problem = str(reply["error"])
    except (ValueError, KeyError, TypeError):
        raise DaemonUnreachableError("the daemon went away before it answered") from None
    raise ControlError(problem)


def _connect(path: Path, timeout: float) -> socket.socket:
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
    while size <= MAX_REPLY:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        part = connection.recv(1 << 20)
        parts.append(part)
        size += len(part)
        if not part or part.endswith(b"\n"):
            break
    return b"".join(parts)
