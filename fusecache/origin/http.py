"""Objects behind http(s)://, listed from the links of index pages by fsspec.

A version is the ETag, or else Last-Modified. Reads are conditional on a strong ETag (If-Match), and what the answer
says of its version is compared in any case.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
from collections.abc import Generator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

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
from fusecache.origin.http_index import find_keys_below
from fusecache.origin.interface import ListPage, OriginBackend
from fusecache.origin.stored_form import ASK_STORED_FORM
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = logging.getLogger(__name__)

_MAX_LISTING_REQUESTS = 16
"""Requests in flight during a listing: index pages tell neither size nor version, so that each object is asked for."""


class HttpBackend(OriginBackend):
    """The objects that the index pages below one URL link to."""

    engine = "fsspec"

    def __init__(self, config: SourceConfig, tuning: Tuning) -> None:
        self._tuning = tuning
        self.identity = identity_from_url(config.url)
        self._root_url = config.url.rstrip("/")
        self._logged_keys: frozenset[str] = frozenset()
        """Keys that the last listing left out, and told of."""
        self._fs = HTTPFileSystem(
            skip_instance_cache=True, use_listings_cache=False, encoded=True, **config.storage_options
        )

    def list_page(self, token: str | None, timeout: float) -> ListPage:
        """All objects in one page, with a GET request for each folder's index and a HEAD request for each object.

        A link that leads nowhere, or to what may not be read, is left out with a warning. Raises the first of these
        refusals when no object is left.
        """
        walk = _IndexWalk(self, timeout)
        with _http_errors(self.identity):
            versions = call_on_loop(self._fs.loop, walk.list_folder, "", timeout=self._tuning.deadline)
        left_out = walk.left_out
        if left_out and not versions:
            raise next(iter(left_out.values()))
        if left_out.keys() - self._logged_keys:
            _log.warning(
                "%s: %d links of its index pages are left out, like this one: %s",
                self.identity,
                len(left_out),
                left_out[min(left_out)],
            )
        self._logged_keys = frozenset(left_out)
        return ListPage(versions)

    async def _fetch_links(self, key: str, timeout: float) -> list[str]:
        """The keys that the index page of a folder links to; none if it is no HTML. Runs on the loop."""
        where = self.object_url(key)
        session = await self._fs.set_session()
        async with session.get(
            self._request_url(key),
            timeout=client_timeout(self._tuning.connect_timeout, timeout),
            **self._fs.kwargs,
        ) as answer:
            if answer.status >= 300:
                raise error_from_status(where, answer.status, "", answer.headers.get("Retry-After"))
            kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            if kind not in ("", "text/html", "application/xhtml+xml"):
                return []
            page = str(self._request_url(key))
            return find_keys_below(page, await answer.text(errors="replace"), self._root_url + "/")

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


class _IndexWalk:
    """One walk through the index pages of a backend, on the loop of its session."""

    def __init__(self, backend: HttpBackend, timeout: float) -> None:
        self.left_out: dict[str, OriginError] = {}
        """The keys of the links that can't be read, and why."""
        self._backend = backend
        self._timeout = timeout
        self._slots = asyncio.Semaphore(_MAX_LISTING_REQUESTS)
        self._seen_keys: set[str] = set()

    async def list_folder(self, folder: str) -> list[ObjectVersion]:
        """All objects below a folder, whose key ends with a slash or is empty. Raises OriginError when its page can't
        be read, or a temporary error when anything below it fails in a way that may pass."""
        async with self._slots:
            keys = await self._backend._fetch_links(folder, self._timeout)
        fresh = [key for key in keys if key not in self._seen_keys]
        self._seen_keys.update(fresh)
        return [version for found in await asyncio.gather(*map(self._follow, fresh)) for version in found]

    async def _follow(self, key: str) -> list[ObjectVersion]:
        errors = _http_errors(self._backend.object_url(key))
        try:
            with errors:
                if key.endswith("/"):
                    return await self.list_folder(key)
                async with self._slots:
                    return [await self._backend._stat_object(key, self._timeout)]
        except OriginError as error:
            if error.is_temporary:
                raise
            self.left_out[key] = error
            return []


def _http_errors(where: str) -> ErrorTranslator:
    return ErrorTranslator(where, translate_aiohttp_error)


def _version_tag(headers: Any) -> str:
    return str(headers.get("ETag") or headers.get("Last-Modified") or "")
