"""Objects behind http(s)://, listed from the links of index pages by fsspec.

A version is the ETag, or else Last-Modified. Reads are conditional on a strong ETag (If-Match), and what the answer
says of its version is compared in any case.
"""

from __future__ import annotations

import asyncio
import email.utils
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import aiohttp
from fsspec.implementations.http import HTTPFileSystem
from yarl import URL

from fusecache.config.model import SourceConfig, Tuning
from fusecache.errors import OriginError
from fusecache.origin.aiohttp_bodies import (
    ErrorTranslator,
    bytes_to_skip,
    call_on_loop,
    close_session_soon,
    stream_body,
)
from fusecache.origin.any_fsspec import identity_from_url
from fusecache.origin.errors_from_answers import error_from_status, version_changed_error
from fusecache.origin.interface import ListPage
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MAX_HEAD_REQUESTS = 16
"""HEAD requests in flight during a listing: index pages tell neither size nor version."""

_UNCOMPRESSED = {"Accept-Encoding": "identity"}


class HttpBackend:
    """See fusecache.origin.interface.Backend."""

    engine = "fsspec"

    def __init__(self, config: SourceConfig, tuning: Tuning) -> None:
        self._tuning = tuning
        self.identity = identity_from_url(config.url)
        self._root_url = config.url.rstrip("/")
        self._fs = HTTPFileSystem(
            skip_instance_cache=True, use_listings_cache=False, encoded=True, **config.storage_options
        )

    def list_page(self, token: str | None, timeout: float) -> ListPage:
        """See Backend: all in one page, with a HEAD request per object."""

        async def everything() -> list[ObjectVersion]:
            session = await self._fs.set_session()
            async with session.get(
                URL(self._root_url + "/", encoded=True), timeout=self._client_timeout(timeout)
            ) as answer:
                if answer.status >= 300:
                    raise error_from_status(self.identity, answer.status)
            found = await self._fs._find(self._root_url + "/", withdirs=False)
            slots = asyncio.Semaphore(_MAX_HEAD_REQUESTS)

            async def one(url: str) -> ObjectVersion:
                async with slots:
                    return await self._stat_object(unquote(url[len(self._root_url) + 1 :]), timeout)

            return list(await asyncio.gather(*map(one, found)))

        with ErrorTranslator(self.identity):
            return ListPage(call_on_loop(self._fs.loop, everything, timeout=self._tuning.deadline))

    def stat_object(self, key: str, timeout: float) -> ObjectVersion:
        """See Backend."""
        with ErrorTranslator(f"{self.identity}/{key}"):
            version: ObjectVersion = call_on_loop(
                self._fs.loop, self._stat_object, key, timeout, timeout=timeout + self._tuning.connect_timeout
            )
            return version

    async def _stat_object(self, key: str, timeout: float) -> ObjectVersion:
        where = f"{self.identity}/{key}"
        session = await self._fs.set_session()
        async with session.head(
            self._object_url(key),
            headers=_UNCOMPRESSED,
            allow_redirects=True,
            timeout=self._client_timeout(timeout),
        ) as answer:
            if answer.status >= 300:
                raise error_from_status(where, answer.status, "", answer.headers.get("Retry-After"))
            length = answer.headers.get("Content-Length")
            if length is None:
                raise OriginError(f"{where}: the server does not tell its size: it can't be mounted")
            modified = answer.headers.get("Last-Modified", "")
            try:
                seconds = int(email.utils.parsedate_to_datetime(modified).timestamp())
            except (ValueError, TypeError):
                seconds = 0
            return ObjectVersion(
                self.identity, key, _version_tag(answer.headers), int(length), seconds * 1_000_000_000
            )

    def read_metadata_sha256(self, version: ObjectVersion, timeout: float) -> bytes | None:
        """See Backend: HTTP has none that servers commonly tell."""
        return None

    def request_range(
        self, version: ObjectVersion, offset: int, length: int, timeout: float
    ) -> Iterator[Buffer]:
        """See Backend."""
        where = f"{self.identity}/{version.key}"
        headers = {**_UNCOMPRESSED, "Range": f"bytes={offset}-{offset + length - 1}"}
        if version.etag.startswith('"'):
            headers["If-Match"] = version.etag

        async def begin() -> Any:
            session = await self._fs.set_session()
            return await session.get(
                self._object_url(version.key),
                headers=headers,
                allow_redirects=True,
                timeout=self._client_timeout(timeout),
            )

        with ErrorTranslator(where):
            answer = call_on_loop(self._fs.loop, begin, timeout=timeout + self._tuning.connect_timeout)
        try:
            if answer.status >= 300:
                raise error_from_status(where, answer.status, "", answer.headers.get("Retry-After"))
            if version.etag and _version_tag(answer.headers) != version.etag:
                raise version_changed_error(where)
            skip = bytes_to_skip(
                where,
                answer.status,
                answer.headers.get("Content-Range"),
                answer.content_length,
                version.size,
                offset,
            )
            yield from stream_body(self._fs.loop, where, answer.content.read, skip, length, timeout)
        finally:
            self._fs.loop.call_soon_threadsafe(answer.close)

    def refresh_credentials(self) -> None:
        """See Backend: there is nothing to renew."""

    def close(self) -> None:
        """See Backend."""
        session = self._fs._session
        if session is not None:
            close_session_soon(self._fs.loop, session)

    def _object_url(self, key: str) -> URL:
        return URL(f"{self._root_url}/{quote(key)}", encoded=True)

    def _client_timeout(self, timeout: float) -> aiohttp.ClientTimeout:
        return aiohttp.ClientTimeout(total=None, sock_connect=self._tuning.connect_timeout, sock_read=timeout)


def _version_tag(headers: Any) -> str:
    return str(headers.get("ETag") or headers.get("Last-Modified") or "")
