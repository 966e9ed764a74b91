"""What a disk does without the page cache: measured with a file that is gone afterwards."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import time
from pathlib import Path

_CALL_BYTES = 4 << 20
"""Bytes of a call: the kernel makes many requests of it, which the disk has at once, as it has from a crew."""
MAX_WRITTEN_BYTES = 64 << 20
"""Bytes that are written, at most."""
_MAX_SECONDS = 2.0
"""Seconds after which enough is known of a slow disk."""
_SAMPLED_PAGES = 64
"""Pages of a file that are looked for in the page cache."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_longlong,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def measure_disk_rates(directory: Path) -> tuple[float, float] | None:
    """Bytes per second that the disk below `directory` takes, and gives, past the page cache; None: the file system
    does not do that. Takes some 0.1 s on NVMe, and 4 s on a disk that is slow. Raises OSError."""
    with tempfile.TemporaryFile(dir=directory, prefix=".pace-") as file, mmap.mmap(-1, _CALL_BYTES) as buffer:
        # not zeros, which some disks don't write
        buffer.write(os.urandom(_CALL_BYTES))
        try:
            fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            began, written = time.monotonic(), 0
            while written < MAX_WRITTEN_BYTES and time.monotonic() - began < _MAX_SECONDS:
                written += os.pwritev(fd, [buffer], written)
            os.fdatasync(fd)
            wrote, given = time.monotonic(), 0
            while given < written and time.monotonic() - wrote < _MAX_SECONDS:
                given += os.preadv(fd, [buffer], given)
            return written / (wrote - began), given / (time.monotonic() - wrote)
        finally:
            os.close(fd)


def is_in_page_cache(fd: int, size: int) -> bool:
    """Whether most of a file is in the page cache, as far as a sample of its pages shows. Reads nothing: preadv2 with
    RWF_NOWAIT would, it reads ahead. Raises OSError."""
    if size <= 0:
        return True
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        last = (size - 1) // mmap.PAGESIZE
        pages = sorted({last * look // _SAMPLED_PAGES for look in range(_SAMPLED_PAGES + 1)})
        there, found = 0, ctypes.c_ubyte()
        for page in pages:
            if _libc.mincore(address + page * mmap.PAGESIZE, mmap.PAGESIZE, ctypes.byref(found)):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            there += found.value & 1
        return 2 * there >= len(pages)
    finally:
        _libc.munmap(address, size)
