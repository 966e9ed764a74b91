"""The contracts of an origin and of its backends.

An `Origin` is synchronous and thread-safe, retries, throttles itself and raises only errors of fusecache.errors. An
`OriginBackend` makes single attempts at single requests with one protocol, and never retries.
"""

from __future__ import annotations

import abc
import base64
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from typing_extensions import Buffer

PAGE_KEYS = 1000
"""Keys per LIST request: the most that S3 and GCS give."""


def never_cancelled() -> bool:
    """The `cancelled` of a caller that always waits for its answer."""
    return False


def parse_metadata_sha256(text: object) -> bytes | None:
    """The sha256 that an uploader wrote into metadata, in hex or base64; None for anything else."""
    if not isinstance(text, str):
        return None
    try:
        found = bytes.fromhex(text) if len(text) == 64 else base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return found if len(found) == 32 else None


class OriginStats:
    """Counters since the start. Any thread may read a field at any time; `add` is the only way to change one. The lock
    is a leaf."""

    def __init__(self, read_concurrency: Callable[[], int] = lambda: 0) -> None:
        """`read_concurrency` says how many requests may be in flight now."""
        self._read_concurrency = read_concurrency
        self._lock = threading.Lock()
        self.requests = 0  # of any kind, retries included
        self.lists = 0  # LIST requests among them
        self.errors = 0  # requests that failed, throttled ones included
        self.throttled = 0  # requests that were answered 429 or 503
        self.retries = 0  # requests made again
        self.bytes = 0  # of objects that were delivered

    @property
    def concurrency(self) -> int:
        """Requests that may be in flight at this moment."""
        return self._read_concurrency()

    def add(
        self,
        *,
        requests: int = 0,
        lists: int = 0,
        errors: int = 0,
        throttled: int = 0,
        retries: int = 0,
        bytes: int = 0,
    ) -> None:
        """Add to the counters. Thread-safe."""
        with self._lock:
            self.requests += requests
            self.lists += lists
            self.errors += errors
            self.throttled += throttled
            self.retries += retries
            self.bytes += bytes


class Origin(Protocol):
    """Object storage below one prefix, read-only. Every method is thread-safe and may block until the configured
    deadline: worker threads call it, never the event loop."""

    @property
    def identity(self) -> str:
        """Canonical and free of secrets: "s3://bucket/prefix", plus "@endpoint" when that is not the usual."""
        ...

    @property
    def engine(self) -> str:
        """The library that moves the bytes: "obstore", "native" or "fsspec"."""
        ...

    @property
    def stats(self) -> OriginStats:
        """The counters of this origin, always the same object."""
        ...

    def list_objects(self) -> Iterator[ObjectVersion]:
        """Every object, keys relative to the prefix, as the server spells them: the catalog filters.

        Raises NotFoundError (no bucket), AccessDeniedError, UnavailableError.
        """
        ...

    def stat_object(self, key: str) -> ObjectVersion:
        """The current version of an object, as the server has it now. Raises NotFoundError when there is no such object
        or bucket, AccessDeniedError, UnavailableError."""
        ...

    def read_metadata_sha256(self, version: ObjectVersion) -> bytes | None:
        """The sha256 of all bytes of this version, if the origin's metadata has one; makes one request. Raises
        NotFoundError, AccessDeniedError, VersionChangedError, UnavailableError."""
        ...

    def read_range(
        self,
        version: ObjectVersion,
        offset: int,
        length: int,
        *,
        deadline: float | None = None,
        cancelled: Callable[[], bool] = never_cancelled,
    ) -> Iterator[Buffer]:
        """Exactly the bytes [offset, offset + length) of this version, in order, in chunks.

        The caller uses each chunk before it asks for the next. `deadline` is an instant of time.monotonic(); without
        one, the configured deadline runs anew after every chunk. Raises NotFoundError, AccessDeniedError,
        VersionChangedError, UnavailableError (deadline), CancelledReadError, ValueError (not in the object).
        """
        ...

    def close(self) -> None:
        """Close the connections; further calls raise UnavailableError."""
        ...


@dataclass(frozen=True)
class ListPage:
    """One page of a listing; `next_token` asks for the page after it and is None on the last."""

    objects: list[ObjectVersion]
    next_token: str | None = None


class OriginBackend(abc.ABC):
    """Single attempts with one protocol. Thread-safe. Every method raises errors of fusecache.errors only."""

    engine: str
    """The library that moves the bytes: "obstore", "native" or "fsspec"."""
    identity: str
    """Canonical URL of the prefix, free of secrets."""

    def object_url(self, key: str) -> str:
        """URL of an object, for messages."""
        return f"{self.identity}/{key}"

    @abc.abstractmethod
    def list_page(self, token: str | None, timeout: float) -> ListPage:
        """Make one LIST request for the page that `token` names, None: the first; keys are relative to the prefix."""

    @abc.abstractmethod
    def stat_object(self, key: str, timeout: float) -> ObjectVersion:
        """The current version of an object. Raises NotFoundError."""

    @abc.abstractmethod
    def request_range(
        self, version: ObjectVersion, offset: int, length: int, timeout: float
    ) -> Generator[Buffer, None, None]:
        """Make one range request for bytes of this version and no other; the chunks may end early.

        `timeout` is the longest wait for the next byte, in seconds. A chunk is valid until the next is asked for.
        """

    def read_metadata_sha256(self, version: ObjectVersion, timeout: float) -> bytes | None:
        """The sha256 that the metadata of this version holds; None when it holds none, as by default."""
        return None

    def refresh_credentials(self) -> None:  # noqa: B027  most have none
        """Get credentials anew, because the present ones were refused. By default there are none to get."""

    def close(self) -> None:  # noqa: B027
        """Close the connections. By default there are none to close."""
