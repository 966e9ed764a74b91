"""The headers of all files of a model, before the bulk of any: engines read them first, and they say where the
tensors lie.

A task examines a file (tensor_formats.py) whenever the bytes came that it asked for; no thread waits. A file that is
not what it should be is fetched in its own order, and the log says so once.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence

from fusecache.errors import FusecacheError
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.service import FetchService
from fusecache.fetch.waiter import Waiter
from fusecache.prefetch.models import tensor_formats
from fusecache.types import ObjectVersion

_log = logging.getLogger(__name__)

MAX_HEADER_FILES = 512
"""Headers are a block each, so that more of them would keep the reader of the first shard from its bytes."""


def fetch_headers(
    fetch_service: FetchService,
    versions: Sequence[ObjectVersion],
    source: str,
    layouts: MutableMapping[int, tensor_formats.TensorLayout],
) -> None:
    """Begin to fetch the headers of those of these files that are not complete. Their layouts are put into `layouts`,
    by the number of the file, as they come, under the scheduling lock. Does disk I/O, and does not wait for bytes."""
    for file, version in list(enumerate(versions))[:MAX_HEADER_FILES]:
        if not tensor_formats.is_known_format(version.key) or not version.size:
            continue
        try:
            object_fetch = fetch_service.fetches.acquire(version, source)
        except FusecacheError as error:
            _log.warning("%s is not fetched ahead: %s", version.key, error)
            return
        if object_fetch.stored.is_complete:
            fetch_service.release_fetch(object_fetch)
            continue
        for offset, length in tensor_formats.first_header_ranges(version.key, version.size):
            _prefetch_bytes(fetch_service, object_fetch, offset, length)
        _HeaderParse(fetch_service, layouts, file, object_fetch).continue_parse(None)


def _prefetch_bytes(fetch_service: FetchService, object_fetch: ObjectFetch, offset: int, length: int) -> None:
    """Have bytes fetched without waiting for them."""
    with contextlib.suppress(FusecacheError):
        _request_header(fetch_service, object_fetch, offset, length, lambda _waiter: None)


def _request_header(
    fetch_service: FetchService,
    object_fetch: ObjectFetch,
    offset: int,
    length: int,
    on_settled: Callable[[Waiter], None],
) -> Waiter | None:
    """Ask for bytes, behind all that readers wait for. None: they are in the store. Raises what `request_bytes`
    raises."""
    return fetch_service.request_bytes(
        object_fetch, offset, length, on_settled, by_reader=False, urgent=False, is_header=True
    )


class _HeaderParse:
    """One file under examination; one task at a time is at it.

    | State | Event | Next state |
    |---|---|---|
    | parsing | the parser asks for bytes that are present | parsing |
    | parsing | it asks for others | waiting: no thread is at it |
    | waiting | they came | parsing, in a task |
    | waiting | they can't be had | over |
    | parsing | the layout is known, the format is wrong, or the disk fails | over: the fetch is released |
    """

    def __init__(
        self,
        fetch_service: FetchService,
        layouts: MutableMapping[int, tensor_formats.TensorLayout],
        file_number: int,
        object_fetch: ObjectFetch,
    ) -> None:
        self._fetch_service = fetch_service
        self._layouts = layouts
        self._file_number = file_number
        self._object_fetch = object_fetch
        self._requests = tensor_formats.parse_layout(object_fetch.version.key, object_fetch.version.size)

    def continue_parse(self, data: bytes | None) -> None:
        """Give the parser the bytes it asked for, None at the beginning, and see to the next ones. In a thread that
        fetches."""
        try:
            while True:
                offset, length = self._requests.send(data) if data is not None else next(self._requests)
                on_settled = self._settled_callback(offset, length)
                waiter = _request_header(self._fetch_service, self._object_fetch, offset, length, on_settled)
                if waiter is not None:
                    return
                data = self._fetch_service.copy_bytes(self._object_fetch, offset, length, {})
                if data is None:
                    break
        except StopIteration as stop:
            layout: tensor_formats.TensorLayout = stop.value
            with self._fetch_service.lock:
                self._layouts[self._file_number] = layout
            for start, end in layout.header_ranges:
                _prefetch_bytes(self._fetch_service, self._object_fetch, start, end - start)
        except tensor_formats.FormatError as error:
            _log.info(
                "%s: its tensors can't be told apart, so it is fetched in its own order: %s",
                self._object_fetch.version.key,
                error,
            )
        except FusecacheError as error:
            _log.debug("%s: no header: %s", self._object_fetch.version.key, error)
        self._fetch_service.release_fetch(self._object_fetch)

    def _settled_callback(self, offset: int, length: int) -> Callable[[Waiter], None]:
        def settled(waiter: Waiter) -> None:
            if waiter.error is not None:
                self._fetch_service.dispatcher.run_soon(
                    functools.partial(self._fetch_service.release_fetch, self._object_fetch)
                )
                return
            self._fetch_service.dispatcher.run_soon(
                functools.partial(self._bytes_arrived, offset, length, waiter.pieces)
            )

        return settled

    def _bytes_arrived(self, offset: int, length: int, pieces: Mapping[int, bytes]) -> None:
        data = self._fetch_service.copy_bytes(self._object_fetch, offset, length, pieces)
        if data is None:
            self._fetch_service.release_fetch(self._object_fetch)
        else:
            self.continue_parse(data)
