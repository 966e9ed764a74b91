"""What an origin is to the rest, and what a backend is to an origin.

An `Origin` is sync and thread-safe, retries, throttles itself and raises only errors of fusecache.errors. A
`Backend` makes single attempts at single requests with one protocol, and never retries.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from typing_extensions import Buffer

PAGE_KEYS = 1000
"""Keys per LIST request: the most that S3 and GCS give."""


def never_cancelled() -> bool:
    """Not cancelled."""
    return False


def parse_metadata_sha256(text: object) -> bytes | None:
    """A sha256 that somebody wrote into metadata, in hex or base64; None for anything else."""
    if not isinstance(text, str):
        return None
    try:
        found = bytes.fromhex(text) if len(text) == 64 else base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return found if len(found) == 32 else None


class OriginStats:
    """Counters since the start; read any field at any time, change them with `add` only."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests = 0  # of any kind, retries included
        self.lists = 0  # LIST requests among them
        self.errors = 0  # requests that failed, throttled ones included
        self.throttled = 0  # requests that were answered 429 or 503
        self.retries = 0  # requests made again
        self.bytes = 0  # of objects that were delivered
        self.concurrency = 0  # most requests in flight at this time

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
        """Count; thread-safe."""
        with self._lock:
            self.requests += requests
            self.lists += lists
            self.errors += errors
            self.throttled += throttled
            self.retries += retries
            self.bytes += bytes

    def as_dict(self) -> dict[str, int]:
        """All counters by name."""
        with self._lock:
            return {name: value for name, value in vars(self).items() if not name.startswith("_")}


class Origin(Protocol):
    """Object storage below one prefix, read-only. Sync, thread-safe; call it from worker threads."""

    @property
    def identity(self) -> str:
        """Canonical and free of secrets: "s3://bucket/prefix", plus "@endpoint" when that is not the usual."""
        ...

    @property
    def engine(self) -> str:
        """Who moves the bytes: "obstore", "native" or "fsspec"."""
        ...

    @property
    def stats(self) -> OriginStats:
        """Counters."""
        ...

    def list_objects(self) -> Iterator[ObjectVersion]:
        """Every object, keys relative to the prefix, as the server has them: catalogs filter.

        Raises NotFoundError (no bucket), AccessDeniedError, UnavailableError.
        """
        ...

    def stat_object(self, key: str) -> ObjectVersion:
        """The current version, from the origin itself. Raises as `list`; NotFoundError: no such object."""
        ...

    def read_metadata_sha256(self, version: ObjectVersion) -> bytes | None:
        """The sha256 of all bytes of this version, if the origin's metadata has one: one request. Raises as `list`;
        NotFoundError, VersionChangedError."""
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

        Use each chunk before asking for the next. `deadline` is an instant of time.monotonic(); without one,
        the configured deadline runs anew after every chunk. Raises NotFoundError, AccessDeniedError,
        VersionChangedError, UnavailableError (deadline), CancelledReadError, ValueError (not in the object).
        """
        ...

    def close(self) -> None:
        """Close connections; further calls fail."""
        ...


@dataclass(frozen=True)
class ListPage:
    """One page of a listing; `following` is the token of the next page, None after the last."""

    objects: list[ObjectVersion]
    next_token: str | None = None


class OriginBackend(Protocol):
    """Single attempts with one protocol. Thread-safe. Raises errors of fusecache.errors only."""

    engine: str
    identity: str

    def list_page(self, token: str | None, timeout: float) -> ListPage:
        """One LIST request; keys relative to the prefix."""
        ...

    def stat_object(self, key: str, timeout: float) -> ObjectVersion:
        """The current version of an object."""
        ...

    def read_metadata_sha256(self, version: ObjectVersion, timeout: float) -> bytes | None:
        """What the metadata of this version has as its sha256; None: nothing."""
        ...

    def request_range(
        self, version: ObjectVersion, offset: int, length: int, timeout: float
    ) -> Iterator[Buffer]:
        """One range request for bytes of this version and no other; it may end early.

        `timeout` is the longest wait for a next byte, in seconds.
        """
        ...

    def refresh_credentials(self) -> None:
        """Get credentials anew: the present ones were refused."""
        ...

    def close(self) -> None:
        """Close connections."""
        ...
