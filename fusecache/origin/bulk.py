"""A bulk engine moves the bytes of a bucket; the bucket's backend does everything else."""

from __future__ import annotations

from typing import Generic, TypeVar

from fusecache.config.model import Tuning
from fusecache.origin.bucket import BucketBackend
from fusecache.origin.interface import ListPage, OriginBackend
from fusecache.types import ObjectVersion

B = TypeVar("B", bound=BucketBackend)


class BulkEngine(OriginBackend, Generic[B]):
    """Lists, stats and credentials come from the bucket's backend; a subclass adds `request_range`, and drops what it
    keeps of credentials and connections in `refresh_credentials` and `close`."""

    def __init__(self, backend: B, tuning: Tuning) -> None:
        self._backend = backend
        self._tuning = tuning
        self.identity = backend.identity

    def list_page(self, token: str | None, timeout: float) -> ListPage:
        """Let the bucket's backend make the LIST request."""
        return self._backend.list_page(token, timeout)

    def stat_object(self, key: str, timeout: float) -> ObjectVersion:
        """Let the bucket's backend ask for the current version."""
        return self._backend.stat_object(key, timeout)

    def read_metadata_sha256(self, version: ObjectVersion, timeout: float) -> bytes | None:
        """Let the bucket's backend look into the metadata."""
        return self._backend.read_metadata_sha256(version, timeout)

    def refresh_credentials(self) -> None:
        """Let the bucket's backend get credentials anew."""
        self._backend.refresh_credentials()

    def close(self) -> None:
        """Close the connections of the bucket's backend."""
        self._backend.close()
