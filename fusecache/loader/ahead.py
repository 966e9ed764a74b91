"""The shards behind the one that is being read, in the order of the index."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from fusecache.errors import FusecacheError
from fusecache.loader import plan
from fusecache.loader.announced import Announced
from fusecache.loader.board import Board
from fusecache.loader.companions import family
from fusecache.loader.interface import Library
from fusecache.loader.office import Office
from fusecache.types import ObjectId, ObjectVersion

if TYPE_CHECKING:
    from fusecache.loader.load import ObjectLoad

_log = logging.getLogger(__name__)

_AGAIN = 60.0
"""Seconds before another first read of a file looks again for the shards behind it."""
_KNOWN = 10_000


class Ahead:
    """Queues whole files. `board` is guarded by the loader's lock; `budget` is in bytes behind the file being read."""

    def __init__(self, office: Office, board: Board, library: Library, budget: int) -> None:
        self._office = office
        self._board = board
        self._library = library
        self._budget = budget
        self._planned: dict[ObjectId, float] = {}
        self._announced = Announced()

    def follow(self, version: ObjectVersion, source: str) -> None:
        """A file is being read: fetch the shards behind it, too; those beside it, if it is a model's config."""
        shard = plan.is_shard(version.key)
        if not (shard or plan.is_config(version.key)):
            return
        now = time.monotonic()
        void: list[str] = []
        dropped: list[ObjectLoad] = []
        with self._office.lock:
            if shard:
                self._announced.loaded(_folder(version))
            elif void := self._announced.add(_folder(version), now):
                dropped = self._board.drop(lambda other: _folder(other) in void)
            planned = now - self._planned.get(version.id, -_AGAIN) < _AGAIN
            if not void and not planned:
                self._planned[version.id] = now
                while len(self._planned) > _KNOWN:
                    del self._planned[next(iter(self._planned))]
                self._board.tasks.append(functools.partial(self._plan, version, source))
                self._office.wake()
        for load in dropped:
            self._office.let_go(load)

    def forget(self, ids: Iterable[ObjectId]) -> None:
        """The load of these is over: look again when the next one begins."""
        with self._office.lock:
            for object_id in ids:
                self._planned.pop(object_id, None)

    def announces_too_many(self, version: ObjectVersion) -> bool:
        """Whether so many configs are read that the models beside them are not loaded, but listed."""
        with self._office.lock:
            return bool(self._announced.add(_folder(version), time.monotonic()))

    def _plan(self, version: ObjectVersion, source: str) -> None:
        def read_index(index: ObjectVersion) -> bytes:
            load = self._office.obtain(index, source)
            try:
                return self._office.read(load, 0, index.size)
            finally:
                self._office.release(load)

        behind = shards_behind(version, self._library.siblings(version), read_index, self._budget)
        with self._office.lock:
            if plan.is_config(version.key) and self._announced.add(_folder(version), time.monotonic()):
                return
        self.want((other, source) for other in behind)

    def want(self, versions: Iterable[tuple[ObjectVersion, str]]) -> None:
        """Fetch these versions (of these sources), in this order, without a reader."""
        with self._office.lock:
            known = {version.id for version, _ in self._board.ahead}
            known.update(load.version.id for load in self._board.active)
            fresh = [(version, source) for version, source in versions if version.id not in known]
            self._board.ahead.extend(fresh)
            self._office.wake()

    def begin(self, version: ObjectVersion, source: str) -> None:
        """Its turn has come; in a thread of the crew."""
        try:
            load = self._office.obtain(version, source)
        except FusecacheError as error:
            _log.warning("%s is not fetched ahead: %s", version.key, error)
            return
        with self._office.lock:
            load.read = True
            load.wanted = None
            if self._board.activate(load):
                self._office.wake()
            complete = load.stored.ready
        self._office.inspect(load)
        if complete:
            self._library.completed(version)
        self._office.release(load)


def _folder(version: ObjectVersion) -> str:
    return f"{version.origin}/{version.key.rpartition('/')[0]}"


def shards_behind(
    version: ObjectVersion,
    siblings: Sequence[ObjectVersion],
    read_index: Callable[[ObjectVersion], bytes],
    budget: int,
) -> list[ObjectVersion]:
    """The versions to fetch after this one, in order, as far as `budget` bytes go.

    `siblings` may hold more than its folder. An index that `read_index` can't read is done without.
    """
    if not plan.is_config(version.key) and not _is_one_of_many(version, siblings):
        return []
    versions = plan.beside(version, siblings)
    name = version.key.rpartition("/")[2]
    order: list[str] = []
    index = plan.index_for(name, list(versions))
    if index is not None and versions[index].size <= plan.INDEX_LIMIT:
        try:
            order = plan.index_order(read_index(versions[index]))
        except FusecacheError as error:
            _log.warning("%s can't be read, shards are fetched by name: %s", index, error)
    behind = []
    for other in plan.following(name, list(versions), order):
        budget -= versions[other].size
        if budget < 0:
            break
        behind.append(versions[other])
    return behind


def _is_one_of_many(version: ObjectVersion, siblings: Sequence[ObjectVersion]) -> bool:
    """Whether its name, or maybe an index, says that it is a shard; quick, since it may be one of thousands that have
    nothing to do with each other."""
    name = version.key.rpartition("/")[2]
    return family(name) is not None or any(other.key.endswith(plan.INDEX_SUFFIX) for other in siblings)
