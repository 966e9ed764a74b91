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

    `evict(n, partly)` frees about n bytes, at least one object, and returns the bytes freed; unless `partly`,
    nothing is evicted and 0 returned when n can't be reached. Thread-safe.
    """

    def __init__(
        self,
        directory: Path,
        ledger: Ledger,
        health: Health,
        *,
        limit: int,
        free_floor: int,
        evict: Callable[[int, bool], int],
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

    def room(self, keeping: float) -> int:
        """Bytes that can be stored without evicting anything, and with this share of the limit left over."""
        return int(self.limit * (1 - keeping)) - self._ledger.used()

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
                if self._evict(missing, False) == 0:
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
                return self._evict(nbytes, False) > 0
            except OSError as error:
                self._health.failed(error)
                return False

    def keep(self) -> None:
        """Evict what is over the bounds without anybody having asked for space: the limit was lowered, or
        others filled the disk. As much as can go; the store's thread calls this now and then."""
        if not self._ledger.counted or self._health.sick or not self._evicting.acquire(blocking=False):
            return
        try:
            excess = max(self._ledger.used() - self.limit, self._below_floor())
            if excess > 0:
                self._ledger.drop_dead()
                self._evict(excess, True)
        except OSError as error:
            self._health.failed(error)
        finally:
            self._evicting.release()

    def hope(self) -> None:
        """Something became evictable."""
        self._hopeless_until = 0.0

    def free(self) -> int:
        """Bytes that the file system would give us now."""
        stat = os.statvfs(self._directory)
        return stat.f_bavail * stat.f_frsize

    def _below_floor(self) -> int:
        """By how many bytes the floor will be missed when all that is reserved was written. What is written
        already counts twice: on the safe side, by what is in flight."""
        return self._ledger.tally().reserved + self.free_floor - self.free()

    def _try(self, nbytes: int) -> int:
        """Reserve and return 0, or return how many bytes have to go first."""
        try:
            excess = self._ledger.reserve(nbytes, self.limit)
            if excess:
                return excess
            excess = self._below_floor()
            if excess <= 0:
                return 0
            self._ledger.unreserve(nbytes)
        except OSError as error:
            self._health.failed(error)
            return nbytes
        return excess
