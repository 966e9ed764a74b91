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
from fusecache.loader import formats
from fusecache.loader.load import ObjectLoad
from fusecache.loader.models import Model
from fusecache.loader.office import Office
from fusecache.loader.waiters import Waiter

_log = logging.getLogger(__name__)

MOST_FILES = 512
"""Headers are a block each, so that more of them would keep the reader of the first shard from its bytes."""


def fetch_heads(office: Office, model: Model) -> None:
    """Begin, for all files of the model that are not whole."""
    for file, version in list(enumerate(model.versions))[:MOST_FILES]:
        if not formats.has_layout(version.key) or not version.size:
            continue
        try:
            load = office.obtain(version, model.source)
        except FusecacheError as error:
            _log.warning("%s is not fetched ahead: %s", version.key, error)
            return
        if load.stored.complete:
            office.release(load)
            continue
        for offset, length in formats.first_ranges(version.key, version.size):
            _bring(office, load, offset, length)
        _Examination(office, model, file, load).go_on(None)


def _bring(office: Office, load: ObjectLoad, offset: int, length: int) -> None:
    """Have bytes fetched without waiting for them."""
    with contextlib.suppress(FusecacheError):
        office.request_head(load, offset, length, lambda _waiter: None)


class _Examination:
    """One file under examination; one task at a time is at it."""

    def __init__(self, office: Office, model: Model, file: int, load: ObjectLoad) -> None:
        self._office = office
        self._model = model
        self._file = file
        self._load = load
        self._questions = formats.examine(load.version.key, load.version.size)

    def go_on(self, data: bytes | None) -> None:
        """Answer its last question, and see to the next one. In a thread of the crew."""
        try:
            while True:
                offset, length = self._questions.send(data) if data is not None else next(self._questions)
                waiter = self._office.request_head(self._load, offset, length, self._settled(offset, length))
                if waiter is not None:
                    return
                data = self._office.copy_out(self._load, offset, length, {})
                if data is None:
                    break
        except StopIteration as stop:
            with self._office.lock:
                self._model.layouts[self._file] = stop.value
            for start, end in stop.value.head:
                _bring(self._office, self._load, start, end - start)
        except formats.FormatError as error:
            _log.info(
                "%s: its tensors can't be told apart, so it is fetched in its own order: %s",
                self._load.version.key,
                error,
            )
        except FusecacheError as error:
            _log.debug("%s: no header: %s", self._load.version.key, error)
        self._office.release(self._load)

    def _settled(self, offset: int, length: int) -> Callable[[Waiter], None]:
        def settled(waiter: Waiter) -> None:
            if waiter.error is not None:
                self._office.task(functools.partial(self._office.release, self._load))
                return
            self._office.task(functools.partial(self._came, offset, length, waiter.pieces))

        return settled

    def _came(self, offset: int, length: int, pieces: Mapping[int, bytes]) -> None:
        data = self._office.copy_out(self._load, offset, length, pieces)
        if data is None:
            self._office.release(self._load)
        else:
            self.go_on(data)
