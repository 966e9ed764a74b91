"""What recordings left out of files: fetched when nobody asks for anything, so that the kernel can read them by itself.

Slowly, one file after the other, and only as far as nothing has to be evicted for it. A load that begins ends it for
its model.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable

from fusecache.errors import FusecacheError
from fusecache.loader.board import QUIET, Board
from fusecache.loader.models import Model
from fusecache.loader.office import Office
from fusecache.types import ObjectVersion

_log = logging.getLogger(__name__)

_KEPT_FREE = 0.1
"""Share of the cache that is left alone by what nobody asked for."""


class Filling:
    """Guarded by the loader's lock, as `board` is."""

    def __init__(self, office: Office, board: Board) -> None:
        self._office = office
        self._board = board
        self._rest: deque[tuple[ObjectVersion, str]] = deque()
        self._reminded = False

    def __len__(self) -> int:
        """Files that are left."""
        return len(self._rest)

    def add(self, versions: Iterable[tuple[ObjectVersion, str]]) -> None:
        """Complete these, of these sources, when there is time."""
        with self._office.lock:
            self._rest.extend(entry for entry in versions if entry not in self._rest)
            self._remind()

    def _remind(self) -> None:
        if not self._reminded and (self._rest or self._board.slow):
            self._reminded = True
            self._board.remind(time.monotonic() + QUIET / 2, self._go_on)
            self._office.wake()

    def stop(self, model: Model) -> None:
        """A load of this model begins: from now on its own order counts. With the lock."""
        self._rest = deque(entry for entry in self._rest if entry[0] not in model.versions)
        for load in list(self._board.slow):
            if load.model is model:
                self._board.retire(load)
                load.wanted = None if load.stored.sealed else model.wanted(load.file)

    def _go_on(self) -> None:
        with self._office.lock:
            self._reminded = False
            self._remind()
            quiet = time.monotonic() - self._board.asked >= QUIET
            if not quiet or self._board.slow or self._board.paused or not self._rest:
                self._office.wake()  # for those that are on their way, if it is quiet again
                return
            version, source = self._rest.popleft()
        try:
            load = self._office.obtain(version, source)
        except FusecacheError as error:
            _log.debug("%s is not completed: %s", version.key, error)
            return
        missing = load.stored.missing * load.stored.block_size
        if not load.stored.complete and missing <= load.stored.room(_KEPT_FREE):
            with self._office.lock:
                if load.gone is None and (load.model is None or load.model.session is None):
                    load.wanted = None
                    self._board.slow.append(load)
                    self._office.wake()
        self._office.release(load)
