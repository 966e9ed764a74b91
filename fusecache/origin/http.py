"""Objects behind http(s)://, listed from the links of index pages by fsspec.

A version is the ETag, or else Last-Modified. Reads are conditional on a strong ETag (If-Match), and what the answer
says of its version is compared in any case.
"""

from __future__ import annotations

import asyncio
import email.utils
from collections.abc import Generator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from fsspec.implementations.http import HTTPFileSystem
from yarl import URL

from fusecache.config.model import SourceConfig, Tuning
from fusecache.errors import OriginError
from fusecache.origin.aiohttp_bodies import (
    RangeAnswer,
    call_on_loop,
    client_timeout,
    close_session_soon,
    ranged_body,
    translate_aiohttp_error,
)
from fusecache.origin.any_fsspec import identity_from_url
from fusecache.origin.errors_from_answers import ErrorTranslator, error_from_status
from fusecache.origin.interface import ListPage, OriginBackend
from fusecache.origin.stored_form import ASK_STORED_FORM
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MAX_HEAD_REQUESTS = 16
"""HEAD requests in flight during a listing: index pages tell neither size nor version."""


class HttpBackend(OriginBackend):
    """The objects that the index pages below one URL link to."""

    engine = "fsspec"

    def __init__(self, config: SourceConfig, tuning: Tuning) -> None:
        self._tuning = tuning
        self.identity = identity_from_url(config.url)
        self._root_url = config.url.rstrip("/")
        self._fs = HTTPFileSystem(
            skip_instance_cache=True, use_listings_cache=False, encoded=True, **config.storage_options
        )

    def list_page(self, token: str | None, timeout: float) -> ListPage:
        """All objects in one page, with a HEAD request for each."""

        async def everything() -> list[ObjectVersion]:
            session = await self._fs.set_session()
            async with session.get(
                URL(self._root_url + "/", encoded=True),
                timeout=client_timeout(self._tuning.connect_timeout, timeout),
            ) as answer:
                if answer.status >= 300:
                    raise error_from_status(self.identity, answer.status)
            found = await self._fs._find(self._root_url + "/", withdirs=False)
            slots = asyncio.Semaphore(_MAX_HEAD_REQUESTS)

            async def one(url: str) -> ObjectVersion:
                async with slots:
                    return await self._stat_object(unquote(url[len(self._root_url) + 1 :]), timeout)

            return list(await asyncio.gather(*map(one, found)))

        with _http_errors(self.identity):
            return ListPage(call_on_loop(self._fs.loop, everything, timeout=self._tuning.deadline))

    def stat_object(self, key: str, timeout: float) -> ObjectVersion:
        """Make one HEAD request."""
        with _http_errors(self.object_url(key)):
            version: ObjectVersion = call_on_loop(
                self._fs.loop, self._stat_object, key, timeout, timeout=timeout + self._tuning.connect_timeout
            )
            return version

    async def _stat_object(self, key: str, timeout: float) -> ObjectVersion:
        where = self.object_url(key)
        session = await self._fs.set_session()
        async with session.head(
            self._request_url(key),
            headers=ASK_STORED_FORM,
            allow_redirects=True,
            timeout=client_timeout(self._tuning.connect_timeout, timeout),
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

    def request_range(
        self, version: ObjectVersion, offset: int, length: int, timeout: float
    ) -> Generator[Buffer, None, None]:
        """Make one GET request, with If-Match where the ETag is a strong one."""
        headers = {**ASK_STORED_FORM, "Range": f"bytes={offset}-{offset + length - 1}"}
        if version.etag.startswith('"'):
            headers["If-Match"] = version.etag

        async def begin() -> Any:
            session = await self._fs.set_session()
            return await session.get(
                self._request_url(version.key),
                headers=headers,
                auto_decompress=False,
                allow_redirects=True,
                timeout=client_timeout(self._tuning.connect_timeout, timeout),
            )

        errors = _http_errors(self.object_url(version.key))
        with errors:
            found = call_on_loop(self._fs.loop, begin, timeout=timeout + self._tuning.connect_timeout)
        answer = RangeAnswer.from_aiohttp(found, _version_tag(found.headers))
        yield from ranged_body(self._fs.loop, errors, answer, version, offset, length, timeout)

    def close(self) -> None:
        """Close the session of fsspec, without waiting."""
        close_session_soon(self._fs)

    def _request_url(self, key: str) -> URL:
        return URL(f"{self._root_url}/{quote(key)}", encoded=True)


def _http_errors(where: str) -> ErrorTranslator:
    return ErrorTranslator(where, translate_aiohttp_error)


def _version_tag(headers: Any) -> str:
    return str(headers.get("ETag") or headers.get("Last-Modified") or "")
