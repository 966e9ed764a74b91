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
from fusecache.origin.errors_from_answers import (
    connection_error,
    error_from_exception,
    error_from_status,
    timeout_error,
    truncated_error,
    version_changed_error,
)
from fusecache.origin.interface import ListPage
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from obstore import GetOptions
    from typing_extensions import Buffer

    # Only for types: gcsfs alone costs an S3 mount 0.5 s and 60 MB.
    from fusecache.origin.gcs import GcsBackend
    from fusecache.origin.s3 import S3Backend

_log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_STATUS_CODE = re.compile(r"status code: (\d{3})\b")
_ERROR_CODE = re.compile(r"<Code>([A-Za-z0-9_.]+)</Code>")
_ERROR_KIND = re.compile(r"\bkind: (\w+)")
_UNSUPPORTED_KEY = re.compile(r"(^|/)(/|\.{1,2}(/|$)|$)|[\x00-\x1f\x7f]")
"""Keys that object_store's Path changes or refuses: empty, '.' and '..' parts, a slash at an end, control bytes."""

_MAX_UNREADABLE_ANSWERS = 3
"""After so many answers that obstore can't read, the backend moves the bytes for good."""


class ObstoreEngine:
    """See fusecache.origin.interface.Backend."""

    engine = "obstore"

    def __init__(self, backend: S3Backend | GcsBackend, tuning: Tuning) -> None:
        self._backend = backend
        self._tuning = tuning
        self._lock = threading.Lock()
        self._client: Any = None
        self._unreadable_answers = 0  # answers that obstore could not read
        self.identity = backend.identity

    def list_page(self, token: str | None, timeout: float) -> ListPage:
        """See Backend."""
        return self._backend.list_page(token, timeout)

    def stat_object(self, key: str, timeout: float) -> ObjectVersion:
        """See Backend."""
        return self._backend.stat_object(key, timeout)

    def read_metadata_sha256(self, version: ObjectVersion, timeout: float) -> bytes | None:
        """See Backend."""
        return self._backend.read_metadata_sha256(version, timeout)

    def request_range(
        self, version: ObjectVersion, offset: int, length: int, timeout: float
    ) -> Iterator[Buffer]:
        """See Backend. The longest wait is the configured one: `timeout` can't be set per request."""
        path = self._backend.prefix + version.key
        if self._unreadable_answers >= _MAX_UNREADABLE_ANSWERS or _UNSUPPORTED_KEY.search(path):
            yield from self._backend.request_range(version, offset, length, timeout)
            return
        where = self._backend.object_url(version.key)
        options: dict[str, Any] = {"range": (offset, offset + length)}
        if version.etag:
            options["version" if self._backend.scheme == "gs" else "if_match"] = version.etag
        try:
            result = obstore.get(self._get_client(), path, options=cast("GetOptions", options))
        except Exception as error:
            if "non-partial response" in str(error) or "status code: 501" in str(error):
                self._count_unreadable_answer(where)
                yield from self._backend.request_range(version, offset, length, timeout)
                return
            raise self._translate_error(where, error, version, timeout) from None
        self._check_answer(where, version, result.meta, result.range, (offset, offset + length))
        chunks = iter(result.stream(min_chunk_size=_CHUNK_BYTES))
        while True:
            try:
                chunk = next(chunks, None)
            except Exception as error:
                raise translate_obstore_error(where, error) from None
            if chunk is None:
                return
            yield chunk

    def _check_answer(
        self,
        where: str,
        version: ObjectVersion,
        meta: Any,
        answered_range: tuple[int, int],
        requested_range: tuple[int, int],
    ) -> None:
        """Trust no server to honour the condition."""
        if meta["size"] != version.size:
            raise version_changed_error(where)
        gcs = self._backend.scheme == "gs"
        tag = (meta["version"] or version.etag) if gcs else meta["e_tag"]
        if version.etag and tag != version.etag:
            raise version_changed_error(where)
        if tuple(answered_range) != requested_range:
            raise truncated_error(where)

    def _translate_error(
        self, where: str, error: Exception, version: ObjectVersion, timeout: float
    ) -> OriginError:
        found = translate_obstore_error(where, error)
        if isinstance(found, NotFoundError) and self._backend.scheme == "gs":
            return self._backend.missing_object_error(version, timeout)
        return found

    def _count_unreadable_answer(self, where: str) -> None:
        with self._lock:
            self._unreadable_answers += 1
            if self._unreadable_answers == 1:
                _log.warning("%s: not an answer that obstore can read: reading through fsspec, slower", where)

    def refresh_credentials(self) -> None:
        """See Backend."""
        self._backend.refresh_credentials()
        with self._lock:
            self._client = None

    def close(self) -> None:
        """See Backend."""
        with self._lock:
            self._client = None
        self._backend.close()

    def _get_client(self) -> Any:
        store = self._client
        if store is None:
            with self._lock:
                store = self._client = self._client or self._make_client()
        return store

    def _make_client(self) -> Any:
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
            google: dict[str, Any] = {"skip_signature": not backend.signs_requests()}
            if backend.is_custom_endpoint:
                google["base_url"] = backend.endpoint
            if backend.signs_requests():
                google["credential_provider"] = backend.get_token
            return obstore.store.GCSStore(
                backend.bucket, client_options=cast("Any", client), retry_config=retry, **google
            )
        bundle = os.environ.get("AWS_CA_BUNDLE")
        if bundle:
            client["root_certificate"] = Path(bundle).read_bytes()
        virtual = backend.uses_virtual_host()
        amazon: dict[str, Any] = {
            "region": backend.find_region(),
            "skip_signature": not backend.signs_requests(),
            "virtual_hosted_style_request": virtual,
            "request_payer": bool(backend.request_headers()),
        }
        if backend.is_custom_endpoint:
            endpoint = backend.endpoint
            if virtual:
                scheme, _, host = endpoint.partition("://")
                endpoint = f"{scheme}://{backend.bucket}.{host}"
            # The variable AWS_ENDPOINT_URL_S3 would win over `endpoint`.
            amazon["aws_endpoint_url_s3" if "AWS_ENDPOINT_URL_S3" in os.environ else "endpoint"] = endpoint
        if backend.signs_requests():
            amazon["credential_provider"] = backend.get_credentials
        return obstore.store.S3Store(
            backend.bucket, client_options=cast("Any", client), retry_config=retry, **amazon
        )


def translate_obstore_error(where: str, error: Exception) -> OriginError:
    """What obstore raises as an error of ours: by status and error code, else by kind."""
    if isinstance(error, OriginError):
        return error
    text = str(error)
    status = _STATUS_CODE.search(text)
    if status:
        code = _ERROR_CODE.search(text)
        return error_from_status(where, int(status[1]), code[1] if code else "")
    if "Received redirect" in text:
        return error_from_status(where, 301)
    if isinstance(error, obstore.exceptions.PreconditionError):
        return version_changed_error(where)
    if isinstance(error, obstore.exceptions.PermissionDeniedError | obstore.exceptions.UnauthenticatedError):
        return error_from_status(where, 403)
    if not isinstance(error, obstore.exceptions.BaseError):
        return error_from_exception(where, error)
    kinds = _ERROR_KIND.findall(text)
    if "Timeout" in kinds or "TimedOut" in text:
        return timeout_error(where)
    if "UnexpectedEof" in kinds:
        return truncated_error(where)
    return connection_error(where, kinds[0] if kinds else type(error).__name__)
