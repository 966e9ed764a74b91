"""What a disk does without the page cache: measured with a file that is gone afterwards."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from pathlib import Path

_CALL = 16 << 20
"""Bytes of a call: the kernel makes many requests of it, which the disk has at once, as it has from a crew."""
MOST = 64 << 20
"""Bytes that are written, at most."""
_LONG = 2.0
"""Seconds after which enough is known of a slow disk."""


def measure(directory: Path) -> float | None:
    """Bytes per second that the disk below `directory` takes, past the page cache; None: the file system does not do
    that. Takes some 0.1 s on NVMe, and 2 s on a disk that is slow. Raises OSError."""
    with tempfile.TemporaryFile(dir=directory, prefix=".pace-") as file, mmap.mmap(-1, _CALL) as buffer:
        # not zeros, which some disks don't write
        buffer.write(os.urandom(_CALL))
        try:
            fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            began, written = time.monotonic(), 0
            while written < MOST and time.monotonic() - began < _LONG:
                written += os.pwritev(fd, [buffer], written)
            os.fdatasync(fd)
            return written / (time.monotonic() - began)
        finally:
            os.close(fd)
