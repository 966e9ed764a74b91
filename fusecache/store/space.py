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

from fusecache.store.disk.ledger import Ledger
from fusecache.store.health import DiskHealth

_log = logging.getLogger(__name__)

_BACKOFF_SECONDS = 1.0
"""Seconds for which a store that could make no room isn't asked to again: a walk over all objects per 16 MiB
range would cost more than it brings. Closing an object ends it at once."""
_EVICT_TIMEOUT = 10.0


class Space:
    """Reservations in `directory`: at most `limit` bytes stored, and at least `free_floor` bytes left on the disk.
    Thread-safe.

    `make_room(n, accepts_less)` evicts objects of at least n bytes, and returns the bytes freed; when n can't be
    reached it evicts what it can if it `accepts_less`, and otherwise nothing. `scan_finished` is set once the ledger
    was counted against the files. `_eviction_lock` is held across `make_room`: one thread evicts at a time.
    """

    def __init__(
        self,
        directory: Path,
        ledger: Ledger,
        health: DiskHealth,
        *,
        limit: int,
        free_floor: int,
        make_room: Callable[[int, bool], int],
        scan_finished: threading.Event,
    ) -> None:
        self.limit = limit
        self.free_floor = free_floor
        self._directory = directory
        self._ledger = ledger
        self._health = health
        self._make_room = make_room
        self._scan_finished = scan_finished
        self._eviction_lock = threading.Lock()
        self._backoff_until = 0.0

    def room_without_eviction(self, kept_share: float) -> int:
        """Bytes that can be stored without evicting anything, and with this share of the limit left over."""
        return int(self.limit * (1 - kept_share)) - self._ledger.used_bytes()

    def reserve_bytes(self, nbytes: int) -> bool:
        """Reserve bytes, evicting for them; False: the disk is sick, or no room can be made. Blocks for disk I/O."""
        if nbytes > self.limit or not self._health.ensure_usable():
            return False
        # a ledger that was lost says 0: nothing is stored before the scan has counted again
        if not self._ledger.is_counted:
            self._scan_finished.wait(_EVICT_TIMEOUT)
            if not self._ledger.is_counted:
                return False
        if self._try_reserve(nbytes) == 0:
            return True
        if time.monotonic() < self._backoff_until or not self._eviction_lock.acquire(timeout=_EVICT_TIMEOUT):
            return False
        try:
            self._ledger.void_dead_reservations()
            while (missing := self._try_reserve(nbytes)) > 0:
                if self._make_room(missing, False) == 0:
                    self._backoff_until = time.monotonic() + _BACKOFF_SECONDS
                    return self._try_reserve(nbytes) == 0
            return True
        except OSError as error:
            self._health.report_failure(error)
            return False
        finally:
            self._eviction_lock.release()

    def unreserve_bytes(self, nbytes: int) -> None:
        """Give reserved bytes back."""
        try:
            self._ledger.unreserve_bytes(nbytes)
        except OSError as error:
            self._health.report_failure(error)

    def evict_on_enospc(self, nbytes: int) -> bool:
        """The disk is full although the space was reserved (something else than the store fills it): evict `nbytes`;
        False: there is nothing to evict."""
        with self._eviction_lock:
            try:
                return self._make_room(nbytes, False) > 0
            except OSError as error:
                self._health.report_failure(error)
                return False

    def enforce_limits(self) -> None:
        """Evict what exceeds the limits, or as much of it as can go: the limit was lowered, or something else fills the
        disk. The store's thread calls this every few seconds; does nothing while another thread evicts."""
        if (
            not self._ledger.is_counted
            or self._health.is_sick
            or not self._eviction_lock.acquire(blocking=False)
        ):
            return
        try:
            excess = max(self._ledger.used_bytes() - self.limit, self._bytes_below_floor())
            if excess > 0:
                self._ledger.void_dead_reservations()
                self._make_room(excess, True)
        except OSError as error:
            self._health.report_failure(error)
        finally:
            self._eviction_lock.release()

    def clear_backoff(self) -> None:
        """Try to make room again at the next request: an object was closed or unpinned, so that more can go."""
        self._backoff_until = 0.0

    def free_bytes(self) -> int:
        """Bytes that the file system would give this process now. Raises OSError."""
        stat = os.statvfs(self._directory)
        return stat.f_bavail * stat.f_frsize

    def _bytes_below_floor(self) -> int:
        """By how many bytes the floor will be missed when all that is reserved was written. Bytes that are written but
        not committed yet count twice, which errs on the safe side. Raises OSError."""
        return self._ledger.tally().reserved + self.free_floor - self.free_bytes()

    def _try_reserve(self, nbytes: int) -> int:
        """Reserve and return 0, or return how many bytes have to go first."""
        try:
            excess = self._ledger.reserve_bytes(nbytes, self.limit)
            if excess:
                return excess
            excess = self._bytes_below_floor()
            if excess <= 0:
                return 0
            self._ledger.unreserve_bytes(nbytes)
        except OSError as error:
            self._health.report_failure(error)
            return nbytes
        return excess
