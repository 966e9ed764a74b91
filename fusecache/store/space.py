"""Room for new blocks: the byte limit, the free-space floor, and making room by eviction.

Both limits are checked before anything is written, over the reservations of all processes on the directory.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fusecache.store.health import Health
from fusecache.store.ledger import Ledger

_log = logging.getLogger(__name__)

_GIVE_UP = 1.0
"""Seconds for which a store that could make no room isn't asked to again: a walk over all objects per 16 MiB
range would cost more than it brings. Closing an object ends it at once."""
_EVICT_TIMEOUT = 10.0


class Space:
    """Reservations in `directory`, at most `limit` bytes stored and at least `free_floor` bytes left on the
    disk.

    `evict(n)` frees about n bytes, at least one object, and returns the bytes freed, 0 when nothing can go.
    Thread-safe.
    """

    def __init__(
        self,
        directory: Path,
        ledger: Ledger,
        health: Health,
        *,
        limit: int,
        free_floor: int,
        evict: Callable[[int], int],
        scanned: threading.Event,
    ) -> None:
        self.limit = limit
        self.free_floor = free_floor
        self._directory = directory
        self._ledger = ledger
        self._health = health
        self._evict = evict
        self._scanned = scanned
        self._evicting = threading.Lock()
        self._hopeless_until = 0.0

    def reserve(self, nbytes: int) -> bool:
        """Reserve bytes, evicting for them; False when the disk is sick or no room can be made."""
        if nbytes > self.limit or not self._health.usable():
            return False
        # a ledger that was lost says 0: nothing is stored before the scan has counted again
        if not self._ledger.counted:
            self._scanned.wait(_EVICT_TIMEOUT)
            if not self._ledger.counted:
                return False
        if self._try(nbytes) == 0:
            return True
        if time.monotonic() < self._hopeless_until or not self._evicting.acquire(timeout=_EVICT_TIMEOUT):
            return False
        try:
            self._ledger.drop_dead()
            while (missing := self._try(nbytes)) > 0:
                if self._evict(missing) == 0:
                    self._hopeless_until = time.monotonic() + _GIVE_UP
                    return self._try(nbytes) == 0
            return True
        except OSError as error:
            self._health.failed(error)
            return False
        finally:
            self._evicting.release()

    def unreserve(self, nbytes: int) -> None:
        """Give reserved bytes back."""
        try:
            self._ledger.unreserve(nbytes)
        except OSError as error:
            self._health.failed(error)

    def relieve(self, nbytes: int) -> bool:
        """The disk is full although the space was reserved (somebody else uses it): evict; False: nothing
        can go."""
        with self._evicting:
            try:
                return self._evict(nbytes) > 0
            except OSError as error:
                self._health.failed(error)
                return False

    def hope(self) -> None:
        """Something became evictable."""
        self._hopeless_until = 0.0

    def free(self) -> int:
        """Bytes that the file system would give us now."""
        stat = os.statvfs(self._directory)
        return stat.f_bavail * stat.f_frsize

    def _try(self, nbytes: int) -> int:
        """Reserve and return 0, or return how many bytes have to go first."""
        try:
            excess = self._ledger.reserve(nbytes, self.limit)
            if excess:
                return excess
            # what is reserved and partly written counts twice here: on the safe side, by what is in flight
            excess = self._ledger.tally().reserved + self.free_floor - self.free()
            if excess <= 0:
                return 0
            self._ledger.unreserve(nbytes)
        except OSError as error:
            self._health.failed(error)
            return nbytes
        return excess
