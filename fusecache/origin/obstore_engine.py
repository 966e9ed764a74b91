"""The bulk engine: obstore (Rust) moves the bytes, the S3 or GCS backend does everything else.

Both use the same credentials, endpoint and region: obstore asks the backend's session for keys. The backend moves the
bytes itself where obstore can't: for keys that obstore refuses to spell, and from servers that answer a range with 200
or have no XML API.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Generator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import obstore
import obstore.exceptions
import obstore.store

from fusecache.config.model import Tuning
from fusecache.errors import NotFoundError, OriginError
from fusecache.origin.bucket import BucketBackend
from fusecache.origin.bulk import BulkEngine
from fusecache.origin.errors_from_answers import (
    ErrorTranslator,
    connection_error,
    error_from_exception,
    error_from_status,
    parse_error_code,
    timeout_error,
    truncated_error,
    version_changed_error,
)
from fusecache.origin.stored_form import ASK_GCS_STORED_FORM, ASK_STORED_FORM
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from obstore import GetOptions
    from typing_extensions import Buffer

_log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_STATUS_CODE = re.compile(r"status code: (\d{3})\b")
_ERROR_KIND = re.compile(r"\bkind: (\w+)")
_UNSUPPORTED_KEY = re.compile(r"(^|/)(/|\.{1,2}(/|$)|$)|[\x00-\x1f\x7f]")
"""Keys that object_store's Path changes or refuses: empty, '.' and '..' parts, a slash at an end, control bytes."""

_UNREADABLE_ANSWER = re.compile(
    r"non-partial response|status code: 501|header (missing from|not present in|contained non)", re.IGNORECASE
)
"""The words of obstore for an answer that lacks a header that obstore needs and reading does not (the length, the time
of the last change), and for 200 and 501 where a range was asked for."""

_MAX_UNREADABLE_ANSWERS = 3
"""After so many answers that obstore can't read, the backend moves the bytes for good."""


class ObstoreEngine(BulkEngine[BucketBackend]):
    """Range requests by obstore. The lock guards the client and the count of unreadable answers; making a client may
    ask the backend for the bucket's region while it is held.

    | What happens | What moves the bytes |
    |---|---|
    | in the beginning | obstore |
    | a key that obstore would change or refuse, or one answer that it can't read | the backend, for this request |
    | _MAX_UNREADABLE_ANSWERS such answers | the backend, for good |
    """

    engine = "obstore"

    def __init__(self, backend: BucketBackend, tuning: Tuning) -> None:
        super().__init__(backend, tuning)
        self._lock = threading.Lock()
        self._client: Any = None
        self._unreadable_answers = 0

    def request_range(
        self, version: ObjectVersion, offset: int, length: int, timeout: float
    ) -> Generator[Buffer, None, None]:
        """Let obstore make one GET request. The longest wait for a byte is `tuning.stall_timeout`: obstore's client has
        one timeout for all requests."""
        path = self._backend.prefix + version.key
        if self._unreadable_answers >= _MAX_UNREADABLE_ANSWERS or _UNSUPPORTED_KEY.search(path):
            yield from self._backend.request_range(version, offset, length, timeout)
            return
        where = self._backend.object_url(version.key)
        options: dict[str, Any] = {"range": (offset, offset + length)}
        if version.etag:
            options[self._backend.condition_option] = version.etag
        try:
            result = obstore.get(self._get_client(), path, options=cast("GetOptions", options))
        except Exception as error:
            if _UNREADABLE_ANSWER.search(str(error)):
                self._count_unreadable_answer(where)
                yield from self._backend.request_range(version, offset, length, timeout)
                return
            found = translate_obstore_error(where, error)
            if isinstance(found, NotFoundError):
                found = self._backend.explain_missing(found, version, timeout)
            raise found from None
        self._check_answer(where, version, result.meta, result.range, (offset, offset + length))
        chunks = iter(result.stream(min_chunk_size=_CHUNK_BYTES))
        errors = ErrorTranslator(where, translate_obstore_error)
        while True:
            with errors:
                chunk = next(chunks, None)
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
        """Raise VersionChangedError or TemporaryOriginError unless the answer is of this version and range: a server
        may have ignored the condition."""
        if meta["size"] != version.size:
            raise version_changed_error(where)
        if version.etag and self._backend.etag_of_meta(meta, version) != version.etag:
            raise version_changed_error(where)
        if tuple(answered_range) != requested_range:
            raise truncated_error(where)

    def _count_unreadable_answer(self, where: str) -> None:
        with self._lock:
            self._unreadable_answers += 1
            if self._unreadable_answers == 1:
                _log.warning("%s: not an answer that obstore can read: reading through fsspec, slower", where)

    def refresh_credentials(self) -> None:
        """Let the bucket's backend get credentials anew, and make a client with them for the next request."""
        super().refresh_credentials()
        with self._lock:
            self._client = None

    def close(self) -> None:
        """Drop the client, and close the connections of the bucket's backend."""
        with self._lock:
            self._client = None
        super().close()

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
            "default_headers": ASK_STORED_FORM if backend.scheme == "s3" else ASK_GCS_STORED_FORM,
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
        options = backend.obstore_options()
        if backend.signs_requests():
            options["credential_provider"] = backend.get_credentials
        bundle = os.environ.get("AWS_CA_BUNDLE") if backend.scheme == "s3" else None
        if bundle:
            client["root_certificate"] = Path(bundle).read_bytes()
        store: Any = obstore.store.S3Store if backend.scheme == "s3" else obstore.store.GCSStore
        return store(backend.bucket, client_options=client, retry_config=retry, **options)


def translate_obstore_error(where: str, error: Exception) -> OriginError:
    """For ErrorTranslator: what obstore raised, told by status and error code, else by the kind in its text. Other
    exceptions are translated, too."""
    if isinstance(error, OriginError):
        return error
    text = str(error)
    status = _STATUS_CODE.search(text)
    if status:
        return error_from_status(where, int(status[1]), parse_error_code(text))
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
