"""Answers of asyncio HTTP clients as sync iterators of bytes, and the checks that every range answer goes through.

fsspec's asynchronous file systems live on an asyncio thread of their own; worker threads hop there once per about
1 MiB. Nothing here retries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
import fsspec.asyn

from fusecache.errors import OriginError
from fusecache.origin.errors_from_answers import (
    ErrorTranslator,
    connection_error,
    error_from_status,
    truncated_error,
    version_changed_error,
)
from fusecache.origin.stored_form import bytes_to_skip, hold_until_end, is_of_unknown_length
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from typing_extensions import Buffer

_HOP_BYTES = 1 << 20
"""Bytes per hop to the asyncio thread: a hop costs about 0.1 ms, aiohttp's pieces have 64-256 KiB."""


def call_on_loop(
    loop: asyncio.AbstractEventLoop, function: Callable[..., Awaitable[Any]], *args: Any, timeout: float
) -> Any:
    """Run a coroutine function on the loop and wait; raises what it raises, or TimeoutError after `timeout` seconds."""
    try:
        return fsspec.asyn.sync(loop, function, *args, timeout=timeout)
    except fsspec.exceptions.FSTimeoutError:
        raise TimeoutError from None


def translate_aiohttp_error(where: str, error: Exception) -> OriginError | None:
    """For ErrorTranslator: what aiohttp means by `error`, None if the error is of another library."""
    if isinstance(error, TimeoutError):
        return None
    if isinstance(error, aiohttp.ClientPayloadError):
        return truncated_error(where)
    if isinstance(error, aiohttp.InvalidURL):
        return OriginError(f"{where}: not a valid URL: check it")
    if isinstance(error, aiohttp.ClientError):
        # Its text may quote headers: only its kind is passed on.
        return connection_error(where, type(error).__name__)
    return None


def client_timeout(connect: float, read: float) -> aiohttp.ClientTimeout:
    """Bounds, in seconds, for a connection attempt and for each wait for bytes; none for the whole request."""
    return aiohttp.ClientTimeout(total=None, sock_connect=connect, sock_read=read)


def close_session_soon(filesystem: Any) -> None:
    """Close the session of an fsspec file system, if it has one, on its own loop. Does not wait."""
    session = filesystem._session
    if session is not None:
        asyncio.run_coroutine_threadsafe(session.close(), filesystem.loop)


@dataclass(frozen=True)
class RangeAnswer:
    """The head of an answer to a range request, and the ways to its body: `read_chunk` and `close` run on the loop."""

    status: int
    etag: str | None
    """As in ObjectVersion; None when the server does not say which version it answers with."""
    content_range: str | None
    content_length: int | None
    content_encoding: str | None
    retry_after: str | None
    read_chunk: Callable[[int], Awaitable[bytes]]
    close: Callable[[], object]

    @classmethod
    def from_aiohttp(cls, answer: aiohttp.ClientResponse, etag: str | None) -> RangeAnswer:
        """The answer of aiohttp, whose headers were found to name the version `etag`."""
        return cls(
            answer.status,
            etag,
            answer.headers.get("Content-Range"),
            answer.content_length,
            answer.headers.get("Content-Encoding"),
            answer.headers.get("Retry-After"),
            answer.content.read,
            answer.close,
        )


def ranged_body(
    loop: asyncio.AbstractEventLoop,
    errors: ErrorTranslator,
    answer: RangeAnswer,
    version: ObjectVersion,
    offset: int,
    length: int,
    timeout: float,
) -> Generator[Buffer, None, None]:
    """The bytes [offset, offset + length) of this version out of an answer, which is closed at the end.

    `timeout` is the longest wait for a next byte, in seconds. Raises what the status means, VersionChangedError when
    the answer is of another version, TemporaryOriginError when it is of another range, OriginError when the body is
    not the stored form of the object. The body may end early.
    """
    where = errors.where
    try:
        if answer.status >= 300:
            raise error_from_status(where, answer.status, "", answer.retry_after)
        if version.etag and answer.etag is not None and answer.etag != version.etag:
            raise version_changed_error(where)
        skip = bytes_to_skip(
            where,
            answer.status,
            answer.content_range,
            answer.content_length,
            version.size,
            offset,
            answer.content_encoding,
        )
        if is_of_unknown_length(answer.status, answer.content_range, answer.content_length):
            body = _stream_body(loop, errors, answer.read_chunk, timeout, version.size + 1)
            yield from hold_until_end(where, body, version.size, offset, length)
        else:
            body = _stream_body(loop, errors, answer.read_chunk, timeout, skip + length)
            yield from _skip_bytes(body, skip)
    finally:
        # A body that was not read to its end takes its connection with it.
        loop.call_soon_threadsafe(answer.close)


def _stream_body(
    loop: asyncio.AbstractEventLoop,
    errors: ErrorTranslator,
    read_chunk: Callable[[int], Awaitable[bytes]],
    timeout: float,
    most: float,
) -> Generator[bytes, None, None]:
    """The body in pieces, in order, until it ends or `most` bytes came."""

    async def read_parts(left: int) -> list[bytes]:
        parts: list[bytes] = []
        while left > 0:
            part = await asyncio.wait_for(read_chunk(left), timeout)
            if not part:
                break
            parts.append(part)
            left -= len(part)
        return parts

    while most > 0:
        # The whole hop has longer than one wait: it is bounded by its waits.
        with errors:
            hop_bytes = int(min(most, _HOP_BYTES))
            parts: list[bytes] = call_on_loop(loop, read_parts, hop_bytes, timeout=100 * timeout)
        if not parts:
            return
        for part in parts:
            most -= len(part)
            yield part


def _skip_bytes(body: Iterable[bytes], skip: int) -> Generator[memoryview, None, None]:
    """The bytes after the first `skip` bytes of a body."""
    for part in body:
        used = min(skip, len(part))
        skip -= used
        if used < len(part):
            yield memoryview(part)[used:]
