"""The daemon's end of the control channel: answers requests, one task per connection.

Only root and the daemon's own user may connect: mode 0600, directory 0700, and SO_PEERCRED.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import trio

from fusecache.control.mounts import make_private_directory
from fusecache.control.protocol import (
    DEFAULT_DEADLINE,
    MAX_REQUEST_BYTES,
    STREAM_TIMEOUT,
    LineBuffer,
    LineTooLongError,
    encode_line,
)
from fusecache.errors import FusecacheError, MountError

_log = logging.getLogger(__name__)

Handler = Callable[[dict[str, Any]], Awaitable[object]]
"""Returns a value for JSON, or a ReplyStream."""

MAX_DEADLINE = 3600.0
IDLE_TIMEOUT = 60.0
"""Seconds that a connection may wait with its next request, or take to read a reply."""
MAX_CONNECTIONS = 64
CLOSE_TIMEOUT = 10.0


@runtime_checkable
class ReplyStream(Protocol):
    """An answer in many items. The server calls `close` exactly once, also when the client is gone."""

    async def next_item(self, stop: trio.Event) -> object | None:
        """The next item, within MAX_ITEM_INTERVAL seconds; None after the last one. The event `stop` is set when the
        client wants the end."""

    def result(self) -> object:
        """The result, which the server sends after the last item."""

    async def close(self) -> None:
        """Release the resources of the stream; the server cancels this after CLOSE_TIMEOUT seconds."""


async def serve_requests(
    path: Path,
    handlers: Mapping[str, Handler],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests on a socket at `path` until cancelled; `started()` is called when the socket listens. A handler
    gets the request; a FusecacheError or ValueError that it raises becomes the error line. A stale socket is replaced.
    Raises MountError when `path` can't be used or another daemon answers there."""
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
    """Reports no more than that the socket listens; trio.serve_listeners() would report its listeners."""

    def __init__(self, task_status: trio.TaskStatus[None]) -> None:
        self._task_status = task_status

    def started(self, value: object = None) -> None:
        self._task_status.started()


@contextlib.contextmanager
def _listening_socket(path: Path) -> Iterator[socket.socket]:
    """A socket that appears at `path` when it is ready to listen, and is removed in the end if it is still ours."""
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
    buffer = LineBuffer(MAX_REQUEST_BYTES)
    while True:
        try:
            with trio.fail_after(IDLE_TIMEOUT):
                while (line := buffer.next_line()) is None:
                    received = await stream.receive_some(MAX_REQUEST_BYTES)
                    if not received:
                        return
                    buffer.feed(received)
        except LineTooLongError as error:
            await _send_bytes(stream, encode_line({"ok": False, "error": f"the request is {error}"}))
            return
        answer = await _answer_request(line, handlers)
        found = answer.get("result")
        if not isinstance(found, ReplyStream):
            await _send_bytes(stream, encode_line(answer))
        elif not await _send_stream(stream, found):
            return


async def _send_bytes(stream: trio.SocketStream, data: bytes, timeout: float = IDLE_TIMEOUT) -> None:
    with trio.fail_after(timeout):
        await stream.send_all(data)


async def _send_stream(stream: trio.SocketStream, source: ReplyStream) -> bool:
    """Send all items and the result; returns whether the client is still there."""
    stop = trio.Event()
    gone = False
    try:
        async with trio.open_nursery() as nursery:

            async def watch_client() -> None:
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

            nursery.start_soon(watch_client)
            try:
                while (item := await source.next_item(stop)) is not None:
                    # an item may be large, and the event loop has others to serve
                    data = await trio.to_thread.run_sync(encode_line, {"ok": True, "item": item})
                    await _send_bytes(stream, data, STREAM_TIMEOUT)
            except (trio.BrokenResourceError, trio.TooSlowError):
                gone = True
            except Exception:
                _log.exception("control: a stream failed")
                gone = True
            nursery.cancel_scope.cancel()
        if not gone:
            await _send_bytes(stream, encode_line({"ok": True, "result": source.result()}), STREAM_TIMEOUT)
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
