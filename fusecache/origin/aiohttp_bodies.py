"""Answers of asyncio HTTP clients as sync iterators of bytes, and the checks that every range answer goes through.

fsspec's asynchronous file systems live on an asyncio thread of their own; worker threads hop there once per about
1 MiB. Nothing here retries.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from types import TracebackType
from typing import Any

import aiohttp
import fsspec.asyn

from fusecache.errors import FusecacheError, OriginError, TemporaryOriginError
from fusecache.origin.errors_from_answers import (
    connection_error,
    error_from_exception,
    timeout_error,
    truncated_error,
    version_changed_error,
)

_HOP_BYTES = 1 << 20
"""Bytes per hop to the asyncio thread: a hop costs about 0.1 ms, aiohttp's pieces have 64-256 KiB."""

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


def call_on_loop(
    loop: asyncio.AbstractEventLoop, function: Callable[..., Awaitable[Any]], *args: Any, timeout: float
) -> Any:
    """Run a coroutine function on the loop and wait; raises what it raises, or TimeoutError."""
    try:
        return fsspec.asyn.sync(loop, function, *args, timeout=timeout)
    except fsspec.exceptions.FSTimeoutError:
        raise TimeoutError from None


class ErrorTranslator:
    """A with block that turns what aiohttp, asyncio and the operating system raise into errors of ours."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, FusecacheError):
            return
        raise (self.translate_error(error) or self._translate_common_error(error)) from None

    def translate_error(self, error: Exception) -> OriginError | None:
        """What a library of its own means by `error`; None: nothing special."""
        return None

    def _translate_common_error(self, error: Exception) -> OriginError:
        if isinstance(error, asyncio.TimeoutError):
            return timeout_error(self.where)
        if isinstance(error, aiohttp.ClientPayloadError):
            return truncated_error(self.where)
        if isinstance(error, aiohttp.InvalidURL):
            return OriginError(f"{self.where}: not a valid URL: check it")
        if isinstance(error, aiohttp.ClientError):
            # Its text may quote headers: only its kind is passed on.
            return connection_error(self.where, type(error).__name__)
        return error_from_exception(self.where, error)


def bytes_to_skip(
    where: str, status: int, content_range: str | None, content_length: int | None, size: int, offset: int
) -> int:
    """How many bytes of the body to skip to get to `offset` of an object of `size` bytes.

    A 200 with the right Content-Range is taken as 206 (some servers do that), one without as the whole object.
    Raises VersionChangedError when the object has another size, TemporaryOriginError on another range.
    """
    found = _CONTENT_RANGE.fullmatch(content_range or "")
    if found:
        if found[3] != "*" and int(found[3]) != size:
            raise version_changed_error(where)
        if int(found[1]) > offset:
            raise TemporaryOriginError(f"{where}: the server answered another range than was asked for")
        return offset - int(found[1])
    if status == 200:
        if content_length is not None and content_length != size:
            raise version_changed_error(where)
        return offset
    raise TemporaryOriginError(f"{where}: the server answered {status} without saying which range")


def stream_body(
    loop: asyncio.AbstractEventLoop,
    where: str,
    read_chunk: Callable[[int], Awaitable[bytes]],
    skip: int,
    length: int,
    timeout: float,
    translator: type[ErrorTranslator] = ErrorTranslator,
) -> Iterator[bytes]:
    """The next `length` bytes after `skip` ones; raises TemporaryOriginError when the body ends before."""

    async def some(most: int) -> list[bytes]:
        parts: list[bytes] = []
        while most > 0:
            part = await asyncio.wait_for(read_chunk(most), timeout)
            if not part:
                break
            parts.append(part)
            most -= len(part)
        return parts

    # The whole hop has longer than one wait: it is bounded by its waits.
    whole = 100 * timeout
    while skip > 0:
        with translator(where):
            parts = call_on_loop(loop, some, min(skip, _HOP_BYTES), timeout=whole)
        if not parts:
            raise truncated_error(where)
        skip -= sum(map(len, parts))
    while length > 0:
        with translator(where):
            parts = call_on_loop(loop, some, min(length, _HOP_BYTES), timeout=whole)
        if not parts:
            raise truncated_error(where)
        for part in parts:
            length -= len(part)
            yield part


def close_session_soon(loop: asyncio.AbstractEventLoop, session: aiohttp.ClientSession) -> None:
    """Close a session on its own loop, without waiting."""
    asyncio.run_coroutine_threadsafe(session.close(), loop)
