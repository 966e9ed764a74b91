"""The headers of all files of a model, before the bulk of any: engines read them first, and they say where the
tensors lie.

A file is examined (formats.py) by a task of the crew whenever the bytes came that it asked for; no thread waits. A
file that is not what it should be is fetched in its own order, and said so once.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping

from fusecache.errors import FusecacheError
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.waiter import Waiter
from fusecache.prefetch.models import tensor_formats
from fusecache.prefetch.models.shards import ModelShards
from fusecache.prefetch.office import Office

_log = logging.getLogger(__name__)

MAX_HEADER_FILES = 512
"""Headers are a block each, so that more of them would keep the reader of the first shard from its bytes."""


def fetch_headers(fetch_service: Office, model: ModelShards) -> None:
    """Begin, for all files of the model that are not whole."""
    for file, version in list(enumerate(model.versions))[:MAX_HEADER_FILES]:
        if not tensor_formats.is_known_format(version.key) or not version.size:
            continue
        try:
            object_fetch = fetch_service.acquire_fetch(version, model.source)
        except FusecacheError as error:
            _log.warning("%s is not fetched ahead: %s", version.key, error)
            return
        if object_fetch.stored.is_complete:
            fetch_service.release_fetch(object_fetch)
            continue
        for offset, length in tensor_formats.first_header_ranges(version.key, version.size):
            _request_bytes(fetch_service, object_fetch, offset, length)
        _HeaderParse(fetch_service, model, file, object_fetch).continue_parse(None)


def _request_bytes(fetch_service: Office, object_fetch: ObjectFetch, offset: int, length: int) -> None:
    """Have bytes fetched without waiting for them."""
    with contextlib.suppress(FusecacheError):
        fetch_service.request_header(object_fetch, offset, length, lambda _waiter: None)


class _HeaderParse:
    """One file under examination; one task at a time is at it."""

    def __init__(
        self, fetch_service: Office, model: ModelShards, file_number: int, object_fetch: ObjectFetch
    ) -> None:
        self._fetch_service = fetch_service
        self._model = model
        self._file_number = file_number
        self._object_fetch = object_fetch
        self._requests = tensor_formats.parse_layout(object_fetch.version.key, object_fetch.version.size)

    def continue_parse(self, data: bytes | None) -> None:
        """Answer its last question, and see to the next one. In a thread of the crew."""
        try:
            while True:
                offset, length = self._requests.send(data) if data is not None else next(self._requests)
                waiter = self._fetch_service.request_header(
                    self._object_fetch, offset, length, self._settled_callback(offset, length)
                )
                if waiter is not None:
                    return
                data = self._fetch_service.copy_bytes(self._object_fetch, offset, length, {})
                if data is None:
                    break
        except StopIteration as stop:
            with self._fetch_service.lock:
                self._model.layouts[self._file_number] = stop.value
            for start, end in stop.value.head:
                _request_bytes(self._fetch_service, self._object_fetch, start, end - start)
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
                self._fetch_service.queue_task(
                    functools.partial(self._fetch_service.release_fetch, self._object_fetch)
                )
                return
            self._fetch_service.queue_task(
                functools.partial(self._bytes_arrived, offset, length, waiter.pieces)
            )

        return settled

    def _bytes_arrived(self, offset: int, length: int, pieces: Mapping[int, bytes]) -> None:
        data = self._fetch_service.copy_bytes(self._object_fetch, offset, length, pieces)
        if data is None:
            self._fetch_service.release_fetch(self._object_fetch)
        else:
            self.continue_parse(data)
