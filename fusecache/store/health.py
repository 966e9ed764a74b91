"""Whether the disk under the store works: one that failed is bypassed, probed and re-admitted.

There is no thread: the first caller that wants space once PROBE_INTERVAL is over writes a probe file, and the others go
on without the disk meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

_log = logging.getLogger(__name__)

PROBE_INTERVAL = 5.0
"""Seconds between two probes of a sick disk."""
_PROBE_BYTES = 1 << 20  # a block: a few bytes would still fit on a full disk

_SICK_ERRNOS = frozenset(
    (
        errno.EIO,
        errno.EROFS,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.ENODEV,
        errno.ENXIO,
        errno.ENOENT,  # the directory was removed
        errno.ESTALE,
        errno.EACCES,
        errno.EPERM,
    )
)


class DiskHealth:
    """State of the disk that holds `directory`. Thread-safe. `clock` is in seconds, monotonic.

    | State | is_sick | Event | Next |
    |---|---|---|---|
    | well | False | `report_failure` with an error that speaks of the disk | sick |
    | sick | True | `ensure_usable` within PROBE_INTERVAL of the last failure or probe | sick |
    | sick | True | `ensure_usable` later, and the probe fails | sick |
    | sick | True | `ensure_usable` later, and the probe can be written | well |
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._probe_path = directory / f".probe.{os.getpid()}"
        self._directory = directory
        self._clock = clock
        self._lock = threading.Lock()
        self._next_probe_at = 0.0
        self._logged_errnos: set[int | None] = set()
        self.is_sick = False

    def report_failure(self, error: OSError) -> None:
        """A call on the disk failed. Errors that say nothing about the disk (EMFILE) are logged once, not counted."""
        if error.errno not in _SICK_ERRNOS:
            with self._lock:
                first = error.errno not in self._logged_errnos
                self._logged_errnos.add(error.errno)
            if first:
                _log.warning("cache directory %s: %s", self._directory, error.strerror)
            return
        with self._lock:
            self._next_probe_at = self._clock() + PROBE_INTERVAL
            was, self.is_sick = self.is_sick, True
        if not was:
            _log.warning(
                "cache directory %s is bypassed: %s; reads go on without it and it is tried again every %g s",
                self._directory,
                error.strerror,
                PROBE_INTERVAL,
            )

    def ensure_usable(self) -> bool:
        """Whether to use the disk. Blocks for a probe of a sick one, when that is due."""
        if not self.is_sick:
            return True
        with self._lock:
            if self._clock() < self._next_probe_at:
                return False
            # the others go on without the disk while this caller probes
            self._next_probe_at = self._clock() + PROBE_INTERVAL
        try:
            self._probe_disk()
        except OSError:
            return False
        with self._lock:
            self.is_sick = False
        _log.info("cache directory %s works again", self._directory)
        return True

    def _probe_disk(self) -> None:
        fd = os.open(self._probe_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(fd, bytes(_PROBE_BYTES), 0)
            os.fdatasync(fd)
        finally:
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(self._probe_path)
