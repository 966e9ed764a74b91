"""An HTTP server that misbehaves on request: in front of a real server, or with objects of its own.

`FaultyServer(upstream)` passes every request on as it is (signatures stay valid: the Host header too) and counts
it; `FaultyServer(objects={...})` serves a folder itself, with ranges, ETags and If-Match. Faults are queued with
`add`, and used up in order by the requests that they match:

    with FaultyServer(server.endpoint) as faulty:
        faulty.add("status", status=503, times=20)       # the next 20 range requests
        faulty.add("truncate", after=100_000)            # ends the connection after 100,000 bytes of the body
        faulty.before(lambda: bucket.delete("a"), nth=3)  # at the third range request from now
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import http.client
import http.server
import math
import re
import socket
import struct
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Literal

Kind = Literal["status", "stall", "truncate", "reset", "whole", "ok_range", "etag", "shift"]
"""status: an answer with this status and no object. stall: nothing more after `after` bytes of the body (none: not
even the header). truncate: a clean end of the connection there; reset: a RST there. whole: 200 and the whole object.
ok_range: 200 with the right Content-Range and the right bytes. etag: another ETag in the answer, same bytes.
shift: 206 with bytes and Content-Range of another place."""

_CHUNK = 256 * 1024
_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-connection"}


@dataclass(frozen=True)
class Request:
    """One request as it came; `kind` is LIST, RANGE, GET, HEAD, PUT, POST or DELETE."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]

    @property
    def kind(self) -> str:
        """The name under which the counters count the request."""
        query = urllib.parse.parse_qs(self.query, keep_blank_values=True)
        if self.method != "GET":
            return self.method
        if "list-type" in query or (self.path.rstrip("/").endswith("/o") and "alt" not in query):
            return "LIST"
        return "RANGE" if "range" in self.headers else "GET"


def ranges(request: Request) -> bool:
    """Matches range requests."""
    return request.kind == "RANGE"


def gets(request: Request) -> bool:
    """Matches requests for bytes of objects, ranges or whole."""
    return request.kind in ("RANGE", "GET")


def lists(request: Request) -> bool:
    """Matches LIST requests."""
    return request.kind == "LIST"


def everything(request: Request) -> bool:
    """Matches."""
    return True


@dataclass
class Fault:
    """One kind of misbehaviour, for the next `times` requests that `match`."""

    kind: Kind
    times: float
    status: int
    after: int | None
    headers: Mapping[str, str]
    body: bytes
    match: Callable[[Request], bool]


@dataclass
class _Hook:
    action: Callable[[], object]
    nth: int
    match: Callable[[Request], bool]


@dataclass
class _Answer:
    status: int
    headers: list[tuple[str, str]]
    length: int
    chunks: Iterator[bytes]
    close: Callable[[], object] = field(default=lambda: None)


class FaultyServer:
    """The server, to be used in a with block. `url` is where it listens; `seen` lists the requests so far."""

    def __init__(
        self,
        upstream: str | None = None,
        objects: dict[str, bytes] | None = None,
        *,
        host: str = "127.0.0.1",
    ) -> None:
        self.objects: dict[str, bytes] = {} if objects is None else objects
        self._upstream = urllib.parse.urlsplit(upstream) if upstream else None
        self._whole: Callable[[str], bytes] | None = None
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._hooks: list[_Hook] = []
        self._released = threading.Event()
        self._open: set[socket.socket] = set()
        self.seen: list[Request] = []
        self.body_bytes = 0
        outer = self

        class Handler(_Handler):
            server_room = outer

        self._server = _Server((host, 0), Handler)
        self.url = f"http://{host}:{self._server.server_address[1]}"

    def __enter__(self) -> FaultyServer:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        self._thread = thread
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)

    def add(
        self,
        kind: Kind,
        *,
        times: float = 1,
        status: int = 503,
        after: int | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        match: Callable[[Request], bool] = ranges,
    ) -> None:
        """Queue a fault; `times` may be math.inf. `after` counts bytes of the body (see Kind)."""
        with self._lock:
            self._faults.append(Fault(kind, times, status, after, headers or {}, body, match))

    def outage(self) -> None:
        """From now on, reset every connection at its next request."""
        self.add("reset", times=math.inf, match=everything)

    def clear(self) -> None:
        """Forget every fault and hook that is left."""
        with self._lock:
            self._faults.clear()
            self._hooks.clear()

    def before(
        self, action: Callable[[], object], *, nth: int = 1, match: Callable[[Request], bool] = ranges
    ) -> None:
        """Run `action` before the `nth` matching request from now is answered."""
        with self._lock:
            self._hooks.append(_Hook(action, nth, match))

    def count(self, kind: str) -> int:
        """Requests of this kind so far (see Request.kind)."""
        with self._lock:
            return sum(request.kind == kind for request in self.seen)

    def counts(self) -> Counter[str]:
        """Requests so far by kind."""
        with self._lock:
            return Counter(request.kind for request in self.seen)

    def reset_counts(self) -> None:
        """Count from nothing again."""
        with self._lock:
            self.seen.clear()
            self.body_bytes = 0

    def fetch_whole_with(self, fetch: Callable[[str], bytes]) -> None:
        """How the fault `whole` gets an object of the upstream, by the path of the request, unquoted.

        A signature covers the Range header, so that it cannot just be left out.
        """
        self._whole = fetch

    def _arrived(self, request: Request) -> tuple[Fault | None, list[Callable[[], object]]]:
        with self._lock:
            self.seen.append(request)
            due = []
            for hook in list(self._hooks):
                if hook.match(request):
                    hook.nth -= 1
                    if hook.nth == 0:
                        due.append(hook.action)
                        self._hooks.remove(hook)
            for fault in self._faults:
                if fault.match(request):
                    fault.times -= 1
                    if fault.times <= 0:
                        self._faults.remove(fault)
                    return fault, due
        return None, due

    def _answer(self, request: Request, body: bytes) -> _Answer:
        if self._upstream is None:
            return self._own(request)
        assert self._upstream.hostname
        connection = http.client.HTTPConnection(self._upstream.hostname, self._upstream.port, timeout=60)
        target = request.path + (f"?{request.query}" if request.query else "")
        connection.putrequest(request.method, target, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            if name not in _HOP and name != "content-length":
                connection.putheader(name, value)
        if body or request.method in ("PUT", "POST"):
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        headers = [
            (k, v) for k, v in answer.getheaders() if k.lower() not in _HOP and k.lower() != "content-length"
        ]
        if request.method == "HEAD" or answer.length is not None:
            length = int(answer.headers.get("Content-Length") or answer.length or 0)
            chunks = iter(lambda: answer.read(_CHUNK), b"")
        else:  # chunked: only short answers are
            data = answer.read()
            length, chunks = len(data), iter([data])
        return _Answer(answer.status, headers, length, chunks, connection.close)

    def _own(self, request: Request) -> _Answer:
        path = urllib.parse.unquote(request.path).lstrip("/")
        data = self.objects.get(path)
        if data is None:
            below = sorted({key[len(path) :].split("/")[0] for key in self.objects if key.startswith(path)})
            if path and not path.endswith("/"):
                folder = any(key.startswith(f"{path}/") for key in self.objects)
                to = [("Location", f"{request.path}/")] if folder else []
                return _Answer(301 if folder else 404, to, 0, iter(()))
            if not below:
                return _Answer(404, [], 0, iter(()))
            folders = {name for name in below if any(k.startswith(f"{path}{name}/") for k in self.objects)}
            links = [name + ("/" if name in folders else "") for name in below]
            page = "".join(f'<a href="{urllib.parse.quote(name)}">{name}</a>\n' for name in links).encode()
            return _Answer(200, [("Content-Type", "text/html")], len(page), iter([page]))
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        headers = [
            ("ETag", etag),
            ("Accept-Ranges", "bytes"),
            ("Last-Modified", email.utils.formatdate(1_700_000_000, usegmt=True)),
        ]
        wanted = request.headers.get("if-match", etag)
        if wanted not in (etag, "*"):
            return _Answer(412, [], 0, iter(()))
        spec = request.headers.get("range")
        if spec is None:
            return _Answer(200, headers, len(data), _pieces(data))
        first, _, last = spec.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
        if start >= len(data):
            return _Answer(416, [("Content-Range", f"bytes */{len(data)}")], 0, iter(()))
        headers.append(("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}"))
        return _Answer(206, headers, stop - start, _pieces(data[start:stop]))

    def _spoil(self, fault: Fault, request: Request, answer: _Answer) -> _Answer:
        """The answers that are whole, but not what was asked for."""
        if fault.kind == "status":
            headers = [("Content-Type", "application/xml"), *fault.headers.items()]
            return _Answer(fault.status, headers, len(fault.body), iter([fault.body]))
        if fault.kind == "ok_range":
            answer.status = 200
        elif fault.kind == "etag":
            rest = [(k, v) for k, v in answer.headers if k.lower() != "etag"]
            answer.headers = [*rest, ("ETag", '"ffffffffffffffffffffffffffffffff"')]
        elif fault.kind == "shift":
            rest = [(k, v) for k, v in answer.headers if k.lower() != "content-range"]
            true = next(v for k, v in answer.headers if k.lower() == "content-range")
            first, last, size = map(int, re.findall(r"\d+", true))
            answer.headers = [*rest, ("Content-Range", f"bytes {first + 1}-{last + 1}/{size}")]
        elif fault.kind == "whole":
            path = urllib.parse.unquote(request.path)
            data = self._whole(path) if self._whole else self.objects[path.lstrip("/")]
            rest = [(k, v) for k, v in answer.headers if k.lower() != "content-range"]
            return _Answer(200, rest, len(data), _pieces(data))
        return answer


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients go away in the middle here: no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_room: FaultyServer
    rfile: IO[bytes]  # type: ignore[assignment,unused-ignore]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle(self) -> None:
        room = self.server_room
        with room._lock:
            room._open.add(self.connection)
        try:
            super().handle()
        except (OSError, http.client.HTTPException):
            self.close_connection = True
        finally:
            with room._lock:
                room._open.discard(self.connection)

    def _serve(self) -> None:
        room = self.server_room
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        request = Request(self.command, path, query, {k.lower(): v for k, v in self.headers.items()})
        fault, actions = room._arrived(request)
        for action in actions:
            action()
        if fault and fault.kind in ("stall", "reset", "truncate") and fault.after is None:
            self._break(fault.kind)
            return
        answer = room._answer(request, body)
        if fault:
            answer = room._spoil(fault, request, answer)
        try:
            self.send_response_only(answer.status)
            for name, value in answer.headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(answer.length))
            self.end_headers()
            if request.method != "HEAD":
                self._send(answer, fault)
        finally:
            answer.close()

    def _send(self, answer: _Answer, fault: Fault | None) -> None:
        limit = fault.after if fault and fault.after is not None else math.inf
        sent = 0
        for chunk in answer.chunks:
            part = chunk[: int(min(len(chunk), limit - sent))]
            self.wfile.write(part)
            sent += len(part)
            with self.server_room._lock:
                self.server_room.body_bytes += len(part)
            if sent >= limit:
                assert fault
                self._break(fault.kind)
                return

    def _break(self, kind: Kind) -> None:
        self.close_connection = True
        if kind == "stall":
            self.server_room._released.wait()
        elif kind == "reset":
            # SO_LINGER 0: close() sends RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve


def _pieces(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), _CHUNK):
        yield data[start : start + _CHUNK]
