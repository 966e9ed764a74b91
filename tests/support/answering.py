"""An HTTP server whose answers a test computes: `AnsweringServer(answer)` calls `answer(Question)` for each request.

with AnsweringServer(lambda question: Answer(body=b"hello")) as server:
    ...  # server.url, server.seen, server.sent_bytes
"""

from __future__ import annotations

import contextlib
import http.server
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType


@dataclass(frozen=True)
class Question:
    """One request as it came; `path` is unquoted, the names in `headers` are in lower case."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]

    def byte_range(self, size: int) -> tuple[int, int] | None:
        """First byte and the one after the last, of an object of `size` bytes; None without a Range header."""
        if "range" not in self.headers:
            return None
        first, _, last = self.headers["range"].removeprefix("bytes=").partition("-")
        return int(first), min(int(last) + 1 if last else size, size)


@dataclass(frozen=True)
class Answer:
    """The answer to send; `tells_length` false: chunked, without Content-Length."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    tells_length: bool = True


NOT_FOUND = Answer(404)


def object_answer(question: Question, data: bytes, headers: Mapping[str, str]) -> Answer:
    """The object, or the range of it that is asked for, as any good server answers."""
    asked = question.byte_range(len(data))
    if asked is None:
        return Answer(200, data, headers)
    first, end = asked
    return Answer(206, data[first:end], {**headers, "Content-Range": f"bytes {first}-{end - 1}/{len(data)}"})


class AnsweringServer:
    """The server, for a with block. `url` is where it listens, `seen` lists the requests so far, `sent_bytes` counts
    the bytes of bodies that were handed to the kernel."""

    def __init__(self, answer: Callable[[Question], Answer]) -> None:
        self.seen: list[Question] = []
        self.sent_bytes = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                path, _, query = self.path.partition("?")
                question = Question(
                    self.command,
                    urllib.parse.unquote(path),
                    dict(urllib.parse.parse_qsl(query, keep_blank_values=True)),
                    {name.lower(): value for name, value in self.headers.items()},
                )
                with outer._lock:
                    outer.seen.append(question)
                try:
                    self._send(answer(question))
                except OSError:
                    self.close_connection = True

            do_HEAD = do_GET

            def _send(self, found: Answer) -> None:
                self.send_response_only(found.status)
                for name, value in found.headers.items():
                    self.send_header(name, value)
                if found.tells_length:
                    self.send_header("Content-Length", str(len(found.body)))
                else:
                    self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                if self.command == "HEAD":
                    return
                for start in range(0, len(found.body), 65536):
                    piece = found.body[start : start + 65536]
                    framed = piece if found.tells_length else b"%x\r\n%b\r\n" % (len(piece), piece)
                    self.wfile.write(framed)
                    with outer._lock:
                        outer.sent_bytes += len(piece)
                if not found.tells_length:
                    self.wfile.write(b"0\r\n\r\n")

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that goes away is no news."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> AnsweringServer:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)
