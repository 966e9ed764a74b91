"""An origin: a backend with retries, adaptive concurrency, resumption and deadlines around it.

`read_range` goes on where an attempt ended: it never asks again for bytes that came. Every attempt is conditional on
the version, so that a range put together from several attempts is still of one version. A refused request (401, 403) is
made again once with fresh credentials.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from fusecache.config.model import Tuning
from fusecache.errors import (
    AccessDeniedError,
    CancelledReadError,
    OriginError,
    ThrottledError,
    UnavailableError,
)
from fusecache.origin.adaptive_limiter import AdaptiveLimiter
from fusecache.origin.backoff import Backoff, raise_last_error
from fusecache.origin.errors_from_answers import truncated_error
from fusecache.origin.interface import OriginBackend, OriginStats, never_cancelled
from fusecache.origin.listing_progress import ListingProgress
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = logging.getLogger(__name__)

T = TypeVar("T")

_MIN_WAIT = 0.05
"""Seconds that a last attempt gets, however close the deadline."""


class RetryingOrigin:
    """An Origin that makes each request of its backend again, until it is answered or the deadline has come.

    | What an attempt ends with | What follows |
    |---|---|
    | a temporary error | a pause, then another attempt; UnavailableError when the pause would reach the deadline |
    | access denied, for the first time | fresh credentials, then another attempt at once |
    | any other error | is raised |
    | fewer bytes than asked for | counts as a temporary error; the next attempt asks for the rest |

    `_refresh_lock` guards `_refresh_count`, and is held while the backend gets credentials: threads that were refused
    at the same time wait for one refresh.
    """

    def __init__(self, backend: OriginBackend, tuning: Tuning) -> None:
        self._backend = backend
        self._tuning = tuning
        self._limiter = AdaptiveLimiter(tuning.concurrency)
        self._refresh_lock = threading.Lock()
        self._refresh_count = 0
        self._is_closed = False
        self.stats = OriginStats(lambda: self._limiter.limit)

    @property
    def identity(self) -> str:
        """The identity of the backend."""
        return self._backend.identity

    @property
    def engine(self) -> str:
        """The engine of the backend."""
        return self._backend.engine

    def list_objects(self) -> Iterator[ObjectVersion]:
        """Ask for one page after the other, each with retries of its own. Raises OriginError when the pages repeat."""
        token: str | None = None
        progress = ListingProgress(self.identity)
        while True:
            page = self._call_with_retries(self.identity, partial(self._backend.list_page, token), lists=1)
            progress.check_page(page)
            yield from page.objects
            if page.next_token is None:
                return
            token = page.next_token

    def stat_object(self, key: str) -> ObjectVersion:
        """Ask the backend for the current version, with retries."""
        where = self._backend.object_url(key)
        return self._call_with_retries(where, partial(self._backend.stat_object, key))

    def read_metadata_sha256(self, version: ObjectVersion) -> bytes | None:
        """Ask the backend for the sha256 in the metadata, with retries."""
        where = self._backend.object_url(version.key)
        return self._call_with_retries(where, partial(self._backend.read_metadata_sha256, version))

    def close(self) -> None:
        """Close the backend; requests that come later raise UnavailableError."""
        self._is_closed = True
        self._backend.close()

    def _call_with_retries(self, where: str, attempt: Callable[[float], T], lists: int = 0) -> T:
        deadline = time.monotonic() + self._tuning.deadline
        backoff = Backoff(self._tuning.retry_initial, self._tuning.retry_max)
        may_refresh = True
        last: OriginError | None = None
        while True:
            seen = self._refresh_count
            try:
                with self._counted_request(where, deadline, never_cancelled, last, lists) as timeout:
                    return attempt(timeout)
            except OriginError as error:
                last = error
                may_refresh = self._prepare_retry(
                    error, seen, may_refresh, backoff, deadline, never_cancelled
                )

    def read_range(
        self,
        version: ObjectVersion,
        offset: int,
        length: int,
        *,
        deadline: float | None = None,
        cancelled: Callable[[], bool] = never_cancelled,
    ) -> Iterator[Buffer]:
        """Check the range now; the iterator asks for it, attempt after attempt, until all bytes came."""
        if offset < 0 or length < 0 or offset + length > version.size:
            raise ValueError(f"[{offset}, {offset + length}) is not in an object of {version.size} bytes")
        return self._read_with_retries(version, offset, offset + length, deadline, cancelled)

    def _read_with_retries(
        self,
        version: ObjectVersion,
        position: int,
        end: int,
        fixed_deadline: float | None,
        cancelled: Callable[[], bool],
    ) -> Iterator[Buffer]:
        where = self._backend.object_url(version.key)
        patience = self._tuning.deadline
        deadline = time.monotonic() + patience if fixed_deadline is None else fixed_deadline
        backoff = Backoff(self._tuning.retry_initial, self._tuning.retry_max)
        may_refresh = True
        last: OriginError | None = None
        while position < end:
            seen = self._refresh_count
            try:
                with self._counted_request(where, deadline, cancelled, last) as timeout:
                    chunks = self._backend.request_range(version, position, end - position, timeout)
                    with contextlib.closing(chunks):
                        for chunk in chunks:
                            size = memoryview(chunk).nbytes
                            if size > end - position:
                                chunk = memoryview(chunk).cast("B")[: end - position]
                                size = end - position
                            position += size
                            self.stats.add(bytes=size)
                            yield chunk
                            backoff.reset_pauses()
                            now = time.monotonic()
                            if fixed_deadline is None:
                                deadline = now + patience
                            if position >= end:
                                break
                            if now > deadline:
                                raise UnavailableError(f"{where}: not all bytes came before the deadline")
                            if cancelled():
                                raise CancelledReadError(f"{where}: the reader went away")
                    if position < end:
                        raise truncated_error(where)
            except OriginError as error:
                last = error
                may_refresh = self._prepare_retry(error, seen, may_refresh, backoff, deadline, cancelled)

    @contextlib.contextmanager
    def _counted_request(
        self,
        where: str,
        deadline: float,
        cancelled: Callable[[], bool],
        last_error: OriginError | None,
        lists: int = 0,
    ) -> Iterator[float]:
        """A with block that is one request: holds a slot, counts the request, adapts the limit to its outcome, and
        gives the longest wait for a byte, in seconds.

        `last_error` is the failure after which this request is made: at the deadline it is the reason. Raises
        UnavailableError, CancelledReadError.
        """
        if self._is_closed:
            raise UnavailableError(f"{where}: the origin is closed")
        if cancelled():
            raise CancelledReadError(f"{where}: the reader went away")
        with self._limiter.hold_slot(where, deadline, cancelled, last_error) as generation:
            left = deadline - time.monotonic()
            if left <= 0:
                if last_error is not None:
                    raise_last_error(last_error)
                raise UnavailableError(f"{where}: not all bytes came before the deadline")
            self.stats.add(requests=1, lists=lists)
            try:
                yield max(_MIN_WAIT, min(self._tuning.stall_timeout, left))
            except OriginError as error:
                throttled = isinstance(error, ThrottledError)
                self.stats.add(errors=1, throttled=int(throttled))
                if throttled:
                    self._limiter.note_throttled(generation)
                raise
            self._limiter.note_success()

    def _prepare_retry(
        self,
        error: OriginError,
        seen_refresh_count: int,
        may_refresh: bool,
        backoff: Backoff,
        deadline: float,
        cancelled: Callable[[], bool],
    ) -> bool:
        """Prepare the next attempt after `error`, or raise it; returns whether a refresh is still allowed."""
        if isinstance(error, AccessDeniedError) and may_refresh:
            self._refresh_credentials(seen_refresh_count)
            self.stats.add(retries=1)
            return False
        if not error.is_temporary:
            raise error
        if time.monotonic() >= deadline:
            raise_last_error(error)
        _log.debug("%s: trying again", error)
        backoff.wait_before_retry(error, deadline, cancelled)
        self.stats.add(retries=1)
        return may_refresh

    def _refresh_credentials(self, seen_refresh_count: int) -> None:
        """Refresh the credentials, unless another thread did since the request was made."""
        with self._refresh_lock:
            if self._refresh_count == seen_refresh_count:
                _log.info("%s: access denied: getting the credentials anew", self.identity)
                self._backend.refresh_credentials()
                self._refresh_count += 1
