"""The common part of the backends of bucket stores: one bucket, one prefix, an endpoint, and the answers to the
questions of a bulk engine that moves the bytes in their place."""

from __future__ import annotations

import abc
from typing import Any, ClassVar, Literal

from fusecache.config.model import SourceConfig, Tuning
from fusecache.errors import OriginError
from fusecache.origin.interface import OriginBackend
from fusecache.types import ObjectVersion


class BucketBackend(OriginBackend):
    """A bucket store through an fsspec file system, which brings session, credentials and endpoint.

    `refresh_credentials` replaces the file system; a request in flight goes on with the one that it began with.
    """

    engine = "fsspec"
    scheme: ClassVar[Literal["s3", "gs"]]
    usual_host: ClassVar[str]
    """The host name of the store's own endpoints holds this."""
    condition_option: ClassVar[Literal["if_match", "version"]]
    """The option with which obstore asks for one version only; its value is the version's etag."""

    def __init__(self, config: SourceConfig, tuning: Tuning, bucket: str, prefix: str) -> None:
        """`prefix` has no slash at its end. Raises ConfigError for credentials or settings that can't be used."""
        self._config = config
        self._tuning = tuning
        self.bucket = bucket
        self.prefix = prefix + "/" if prefix else ""
        self._fs = self._make_filesystem()
        self.endpoint = self._find_endpoint()
        self.is_custom_endpoint = self.usual_host not in self.endpoint
        self.identity = f"{self.scheme}://{bucket}" + (f"/{prefix}" if prefix else "")
        if self.is_custom_endpoint:
            self.identity += "@" + self.endpoint.split("://")[-1].rpartition("@")[2].rstrip("/")

    @abc.abstractmethod
    def _make_filesystem(self) -> Any:
        """A new fsspec file system with fresh credentials, its own retries off. Raises ConfigError."""

    @abc.abstractmethod
    def _find_endpoint(self) -> str:
        """The URL that the file system sends requests to."""

    # -- for a bulk engine

    @abc.abstractmethod
    def signs_requests(self) -> bool:
        """Whether requests carry credentials."""

    @abc.abstractmethod
    def get_credentials(self) -> dict[str, Any]:
        """The credentials that the file system uses now, in the form that obstore wants. May wait for the renewal of
        them. Raises AccessDeniedError."""

    @abc.abstractmethod
    def obstore_options(self) -> dict[str, Any]:
        """The arguments of obstore's store for this bucket, without clients, retries and credentials."""

    @abc.abstractmethod
    def etag_of_meta(self, meta: Any, version: ObjectVersion) -> str | None:
        """The etag, as in ObjectVersion, of what obstore answered when it was asked for `version`."""

    def explain_missing(self, error: OriginError, version: ObjectVersion, timeout: float) -> OriginError:
        """The error to raise when the store answered `error` (NotFoundError) to a request for this version: by default
        just that. May make a request."""
        return error
