"""The bulk engine for S3 over plain HTTP: the kernel copies a body straight into a buffer that is used again and again.

Measured here against SeaweedFS on the loopback, 16 MiB ranges written to tmpfs, CPU seconds of this process per GB:
0.40-0.60, where obstore needs 0.70-1.20 (it copies each byte twice more) and s5cmd about 1.0. Over TLS Python's
recv_into goes record by record under the GIL: there obstore is the engine.

A chunk is received with one recv(MSG_WAITALL): no wake-up of Python per packet. SO_RCVTIMEO bounds it, because a
timeout that Python keeps costs a poll() per recv and takes the flag's meaning away.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

import botocore.auth
import botocore.awsrequest
import botocore.credentials

from fusecache.config.model import Tuning
from fusecache.errors import OriginError
from fusecache.origin.bulk import BulkEngine
from fusecache.origin.errors_from_answers import (
    ErrorTranslator,
    connection_error,
    error_from_status,
    parse_error_code,
    timeout_error,
    truncated_error,
    version_changed_error,
)
from fusecache.origin.s3 import CREDENTIALS_LIFETIME, S3Backend, normalize_etag
from fusecache.origin.stored_form import (
    ASK_STORED_FORM,
    bytes_to_skip,
    hold_until_end,
    is_of_unknown_length,
)
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from typing_extensions import Buffer

_CHUNK_BYTES = 256 << 10
"""Bytes of a buffer. A block is passed on to other nodes as soon as it is complete, so that a chunk should not be
larger than a small block."""
_MAX_IDLE_SECONDS = 15.0
"""Seconds that an unused connection is kept: servers and balancers close them after 20-60."""

_MAX_ERROR_BODY = 64 * 1024


def supports_endpoint(endpoint: str) -> bool:
    """Whether this engine can and should talk to the endpoint: plain HTTP, and no proxy on the way."""
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    return parts.scheme == "http" and ("http" not in getproxies() or bool(proxy_bypass(host)))


class _Connection:
    """A kept connection and its buffer; used by one request at a time."""

    def __init__(self, host: str, port: int, timeout: float) -> None:
        self.sock = socket.create_connection((host, port), timeout)
        self.sock.settimeout(None)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.http = http.client.HTTPConnection(host, port)
        self.http.sock = self.sock
        self.buffer = memoryview(bytearray(_CHUNK_BYTES))
        self.has_answered = False  # an answer came over it
        self.idle_since = time.monotonic()

    def set_wait_limit(self, timeout: float) -> None:
        """Let every wait for bytes end after `timeout` seconds."""
        seconds = int(timeout)
        value = struct.pack("ll", seconds, max(1, int((timeout - seconds) * 1_000_000)))
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.http.close()
        with contextlib.suppress(OSError):
            self.sock.close()


class PlainHttpEngine(BulkEngine[S3Backend]):
    """Range requests over connections that are kept. The lock guards the idle connections and the keys; it is a leaf.

    | What happens | A connection |
    |---|---|
    | a request finds no idle one | is made |
    | its answer was read to the end, and the server keeps it open | is idle |
    | a request takes it within _MAX_IDLE_SECONDS | is in use by that request alone |
    | an error, an answer that was not read to its end, or more idle ones than `tuning.concurrency` | is closed |
    """

    engine = "native"

    def __init__(self, backend: S3Backend, tuning: Tuning) -> None:
        super().__init__(backend, tuning)
        parts = urlsplit(backend.endpoint)
        self._host = parts.hostname or ""
        self._port = parts.port or 80
        self._host_header = parts.netloc.rpartition("@")[2]
        self._base_path = parts.path.rstrip("/")
        if backend.uses_virtual_host():
            self._host_header = f"{backend.bucket}.{self._host_header}"
            self._host = f"{backend.bucket}.{self._host}"
        else:
            self._base_path += f"/{quote(backend.bucket)}"
        self._lock = threading.Lock()
        self._idle_connections: list[_Connection] = []
        self._cached_credentials: Any = None
        self._credentials_expiry = 0.0
        self._region: str | None = None

    def request_range(
        self, version: ObjectVersion, offset: int, length: int, timeout: float
    ) -> Generator[Buffer, None, None]:
        """Make one GET request; each chunk is the connection's buffer, which the next one overwrites."""
        where = self._backend.object_url(version.key)
        errors = ErrorTranslator(where, _translate_http_error)
        with errors:
            connection, answer = self._send_request(version, offset, length, timeout)
        whole = False
        try:
            with errors:
                if answer.status >= 300:
                    body = answer.read(_MAX_ERROR_BODY)
                    whole = answer.isclosed()
                    raise error_from_status(
                        where, answer.status, parse_error_code(body), answer.getheader("Retry-After")
                    )
            if version.etag and normalize_etag(answer.getheader("ETag")) != version.etag:
                raise version_changed_error(where)
            skip = bytes_to_skip(
                where,
                answer.status,
                answer.getheader("Content-Range"),
                answer.length,
                version.size,
                offset,
                answer.getheader("Content-Encoding"),
            )
            left = answer.length
            with errors:
                receive = _make_receiver(connection, answer)
            if is_of_unknown_length(answer.status, answer.getheader("Content-Range"), left):
                chunks = _body_chunks(errors, receive, connection.buffer)
                yield from hold_until_end(where, chunks, version.size, offset, length)
                whole = True
                return
            while length > 0:
                with errors:
                    got = receive(min(_CHUNK_BYTES, skip + length))
                if not got:
                    raise truncated_error(where)
                if left is not None:
                    left -= got
                used = min(skip, got)
                skip -= used
                if used < got:
                    length -= got - used
                    yield connection.buffer[used:got]
            whole = left == 0
        finally:
            keep = whole and not answer.will_close
            answer.close()
            self._return_connection(connection, keep)

    def _send_request(
        self, version: ObjectVersion, offset: int, length: int, timeout: float
    ) -> tuple[_Connection, http.client.HTTPResponse]:
        path = f"{self._base_path}/{quote(self._backend.prefix + version.key, safe='/~')}"
        headers = {"Range": f"bytes={offset}-{offset + length - 1}", **self._backend.request_headers()}
        if version.etag:
            headers["If-Match"] = version.etag
        signed = self._sign_headers(path, headers)
        while True:
            connection = self._take_connection()
            reused = connection.has_answered
            began = time.monotonic()
            try:
                connection.set_wait_limit(timeout)
                connection.http.putrequest("GET", path, skip_host=True, skip_accept_encoding=True)
                # Not signed: balancers and gateways on the way may change it.
                for name, value in (signed | ASK_STORED_FORM).items():
                    connection.http.putheader(name, value)
                connection.http.endheaders()
                answer = connection.http.getresponse()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if time.monotonic() - began >= timeout * 0.95:
                    raise TimeoutError from error
                if not reused:
                    raise
                # The server closed it while it was idle: that says nothing of this request.
                continue
            except BaseException:
                connection.close()
                raise
            connection.has_answered = True
            return connection, answer

    def _sign_headers(self, path: str, headers: dict[str, str]) -> dict[str, str]:
        headers = {"Host": self._host_header, **headers}
        if not self._backend.signs_requests():
            return headers
        request = botocore.awsrequest.AWSRequest(
            "GET",
            f"http://{self._host_header}{path}",
            headers={**headers, "X-Amz-Content-SHA256": "UNSIGNED-PAYLOAD"},
        )
        keys = self._get_credentials()
        botocore.auth.S3SigV4Auth(keys, "s3", self._region).add_auth(request)
        return dict(request.headers.items())

    def _get_credentials(self) -> Any:
        with self._lock:
            if self._cached_credentials is not None and time.monotonic() < self._credentials_expiry:
                return self._cached_credentials
        # Two threads may both ask, which is harmless: the lock is not held while botocore waits.
        found = self._backend.get_credentials()
        region = self._region or self._backend.find_region()
        keys = botocore.credentials.Credentials(
            found["access_key_id"], found["secret_access_key"], found["token"]
        )
        with self._lock:
            self._cached_credentials, self._region = keys, region
            self._credentials_expiry = time.monotonic() + CREDENTIALS_LIFETIME.total_seconds()
        return keys

    def _take_connection(self) -> _Connection:
        now = time.monotonic()
        stale = []
        found = None
        with self._lock:
            while self._idle_connections and found is None:
                connection = self._idle_connections.pop()
                if now - connection.idle_since < _MAX_IDLE_SECONDS:
                    found = connection
                else:
                    stale.append(connection)
        for connection in stale:
            connection.close()
        return found or _Connection(self._host, self._port, self._tuning.connect_timeout)

    def _return_connection(self, connection: _Connection, keep: bool) -> None:
        if keep:
            connection.idle_since = time.monotonic()
            with self._lock:
                if len(self._idle_connections) < self._tuning.concurrency:
                    self._idle_connections.append(connection)
                    return
        connection.close()

    def refresh_credentials(self) -> None:
        """Let the bucket's backend get credentials anew, and drop those that were kept here."""
        super().refresh_credentials()
        with self._lock:
            self._cached_credentials = None

    def close(self) -> None:
        """Close the idle connections and those of the bucket's backend."""
        with self._lock:
            idle, self._idle_connections = self._idle_connections, []
        for connection in idle:
            connection.close()
        super().close()


def _body_chunks(
    errors: ErrorTranslator, receive: Callable[[int], int], buffer: memoryview
) -> Generator[memoryview, None, None]:
    """The chunks of a body to its end; each is the buffer, which the next one overwrites."""
    while True:
        with errors:
            got = receive(_CHUNK_BYTES)
        if not got:
            return
        yield buffer[:got]


def _make_receiver(connection: _Connection, answer: http.client.HTTPResponse) -> Any:
    """A function that fills the connection's buffer with up to n bytes of the body; 0 at its end."""
    if answer.length is None or answer.chunked:

        def decoded(most: int) -> int:
            return answer.readinto(connection.buffer[:most]) or 0

        return decoded
    # The reader of the header may have read a part of the body: that comes first, the rest from the socket.
    begun = answer.fp.peek()
    sock = connection.sock
    end = answer.length

    def direct(most: int) -> int:
        nonlocal begun, end
        most = min(most, end)
        if begun:
            got = min(len(begun), most)
            connection.buffer[:got] = begun[:got]
            begun = begun[got:]
        else:
            got = sock.recv_into(connection.buffer, most, socket.MSG_WAITALL) if most else 0
        end -= got
        return got

    return direct


def _translate_http_error(where: str, error: Exception) -> OriginError | None:
    if isinstance(error, BlockingIOError):  # SO_RCVTIMEO
        return timeout_error(where)
    if isinstance(error, http.client.HTTPException):
        return connection_error(where, type(error).__name__)
    return None
