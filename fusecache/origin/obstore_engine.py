"""The bulk engine: obstore (Rust) moves the bytes, the S3 or GCS backend does everything else.

Both use the same credentials, endpoint and region: obstore asks the backend's session for keys. Where obstore can't
(keys that it refuses to spell, servers that answer a range with 200 or have no XML API), the backend moves the bytes
itself.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import obstore
import obstore.exceptions
import obstore.store

from fusecache.config.model import Tuning
from fusecache.errors import NotFoundError, OriginError
from fusecache.origin import failures
from fusecache.origin.base import Page
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from obstore import GetOptions
    from typing_extensions import Buffer

    # Only for types: gcsfs alone costs an S3 mount 0.5 s and 60 MB.
    from fusecache.origin.gcs import GcsBackend
    from fusecache.origin.s3 import S3Backend

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_STATUS = re.compile(r"status code: (\d{3})\b")
_CODE = re.compile(r"<Code>([A-Za-z0-9_.]+)</Code>")
_KIND = re.compile(r"\bkind: (\w+)")
_ODD = re.compile(r"(^|/)(/|\.{1,2}(/|$)|$)|[\x00-\x1f\x7f]")
"""Keys that object_store's Path changes or refuses: empty, '.' and '..' parts, a slash at an end, control bytes."""

_GIVE_UP = 3
"""After so many answers that obstore can't read, the backend moves the bytes for good."""


class ObstoreBackend:
    """See fusecache.origin.base.Backend."""

    engine = "obstore"

    def __init__(self, backend: S3Backend | GcsBackend, tuning: Tuning) -> None:
        self._backend = backend
        self._tuning = tuning
        self._lock = threading.Lock()
        self._store: Any = None
        self._unread = 0  # answers that obstore could not read
        self.identity = backend.identity

    def page(self, token: str | None, timeout: float) -> Page:
        """See Backend."""
        return self._backend.page(token, timeout)

    def head(self, key: str, timeout: float) -> ObjectVersion:
        """See Backend."""
        return self._backend.head(key, timeout)

    def sha256(self, version: ObjectVersion, timeout: float) -> bytes | None:
        """See Backend."""
        return self._backend.sha256(version, timeout)

    def fetch(self, version: ObjectVersion, offset: int, length: int, timeout: float) -> Iterator[Buffer]:
        """See Backend. The longest wait is the configured one: `timeout` can't be set per request."""
        path = self._backend.prefix + version.key
        if self._unread >= _GIVE_UP or _ODD.search(path):
            yield from self._backend.fetch(version, offset, length, timeout)
            return
        where = self._backend.where(version.key)
        options: dict[str, Any] = {"range": (offset, offset + length)}
        if version.etag:
            options["version" if self._backend.scheme == "gs" else "if_match"] = version.etag
        try:
            result = obstore.get(self._connected(), path, options=cast("GetOptions", options))
        except Exception as error:
            if "non-partial response" in str(error) or "status code: 501" in str(error):
                self._note_unread(where)
                yield from self._backend.fetch(version, offset, length, timeout)
                return
            raise self._judged(where, error, version, timeout) from None
        self._check(where, version, result.meta, result.range, (offset, offset + length))
        chunks = iter(result.stream(min_chunk_size=_CHUNK))
        while True:
            try:
                chunk = next(chunks, None)
            except Exception as error:
                raise translated(where, error) from None
            if chunk is None:
                return
            yield chunk

    def _check(
        self, where: str, version: ObjectVersion, meta: Any, got: tuple[int, int], wanted: tuple[int, int]
    ) -> None:
        """Trust no server to honour the condition."""
        if meta["size"] != version.size:
            raise failures.changed(where)
        gcs = self._backend.scheme == "gs"
        tag = (meta["version"] or version.etag) if gcs else meta["e_tag"]
        if version.etag and tag != version.etag:
            raise failures.changed(where)
        if tuple(got) != wanted:
            raise failures.truncated(where)

    def _judged(self, where: str, error: Exception, version: ObjectVersion, timeout: float) -> OriginError:
        found = translated(where, error)
        if isinstance(found, NotFoundError) and self._backend.scheme == "gs":
            return self._backend.missing(version, timeout)
        return found

    def _note_unread(self, where: str) -> None:
        with self._lock:
            self._unread += 1
            if self._unread == 1:
                log.warning("%s: not an answer that obstore can read: reading through fsspec, slower", where)

    def refresh(self) -> None:
        """See Backend."""
        self._backend.refresh()
        with self._lock:
            self._store = None

    def close(self) -> None:
        """See Backend."""
        with self._lock:
            self._store = None
        self._backend.close()

    def _connected(self) -> Any:
        store = self._store
        if store is None:
            with self._lock:
                store = self._store = self._store or self._connect()
        return store

    def _connect(self) -> Any:
        backend, tuning = self._backend, self._tuning
        client: dict[str, Any] = {
            "allow_http": True,
            "connect_timeout": timedelta(seconds=tuning.connect_timeout),
            "read_timeout": timedelta(seconds=tuning.stall_timeout),
            # Bounds a whole answer; stalls are what read_timeout is for.
            "timeout": timedelta(hours=1),
            "pool_idle_timeout": timedelta(seconds=60),
        }
        # One attempt: retries, and what they learn of the load, are ours.
        retry: Any = {
            "max_retries": 0,
            "retry_timeout": timedelta(seconds=tuning.deadline),
            "backoff": {
                "init_backoff": timedelta(seconds=0.1),
                "max_backoff": timedelta(seconds=1),
                "base": 2,
            },
        }
        if backend.scheme == "gs":
            google: dict[str, Any] = {"skip_signature": not backend.signed()}
            if backend.custom:
                google["base_url"] = backend.endpoint
            if backend.signed():
                google["credential_provider"] = backend.token
            return obstore.store.GCSStore(
                backend.bucket, client_options=cast("Any", client), retry_config=retry, **google
            )
        bundle = os.environ.get("AWS_CA_BUNDLE")
        if bundle:
            client["root_certificate"] = Path(bundle).read_bytes()
        virtual = backend.virtual_host()
        amazon: dict[str, Any] = {
            "region": backend.region(),
            "skip_signature": not backend.signed(),
            "virtual_hosted_style_request": virtual,
            "request_payer": bool(backend.request_headers()),
        }
        if backend.custom:
            endpoint = backend.endpoint
            if virtual:
                scheme, _, host = endpoint.partition("://")
                endpoint = f"{scheme}://{backend.bucket}.{host}"
            # The variable AWS_ENDPOINT_URL_S3 would win over `endpoint`.
            amazon["aws_endpoint_url_s3" if "AWS_ENDPOINT_URL_S3" in os.environ else "endpoint"] = endpoint
        if backend.signed():
            amazon["credential_provider"] = backend.keys
        return obstore.store.S3Store(
            backend.bucket, client_options=cast("Any", client), retry_config=retry, **amazon
        )


def translated(where: str, error: Exception) -> OriginError:
    """What obstore raises as an error of ours: by status and error code, else by kind."""
    if isinstance(error, OriginError):
        return error
    text = str(error)
    status = _STATUS.search(text)
    if status:
        code = _CODE.search(text)
        return failures.from_status(where, int(status[1]), code[1] if code else "")
    if "Received redirect" in text:
        return failures.from_status(where, 301)
    if isinstance(error, obstore.exceptions.PreconditionError):
        return failures.changed(where)
    if isinstance(error, obstore.exceptions.PermissionDeniedError | obstore.exceptions.UnauthenticatedError):
        return failures.from_status(where, 403)
    if not isinstance(error, obstore.exceptions.BaseError):
        return failures.from_os_error(where, error)
    kinds = _KIND.findall(text)
    if "Timeout" in kinds or "TimedOut" in text:
        return failures.timed_out(where)
    if "UnexpectedEof" in kinds:
        return failures.truncated(where)
    return failures.broken(where, kinds[0] if kinds else type(error).__name__)
