"""Answer a READ from the store with one copy, in the kernel: data file -> pipe -> /dev/fuse.

The pages of the data file's page cache are handed to the FUSE device by reference and copied once, into the page
cache of the FUSE inode. Next to writev from a mapping of the file it takes no page faults, and the file's pages
do not count as memory of this process. One instance per thread.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading

from fusecache.mount.protocol import OUT_HEADER

_F_SETPIPE_SZ = 1031
_PAGE = 4096
_MOST_PAGES = 256
"""Of a READ: 1 MiB, fuse.max_pages_limit as delivered."""
_EXTRA = 2
"""Slots of the pipe besides: the header, and one more page where the offset is not aligned."""


class ShortReadError(OSError):
    """The data file ended, or broke, before the bytes that the index says it has."""


class Splicer:
    """Writes replies to FUSE descriptors; `close` it."""

    def __init__(self) -> None:
        self._read = self._write = -1
        self._room = 0
        self._make()

    def _make(self) -> None:
        self._read, self._write = os.pipe2(os.O_CLOEXEC)
        self._room = 16
        for pages in (2 * _MOST_PAGES, _MOST_PAGES, _MOST_PAGES // 4):
            try:
                # a power of two; beyond fs.pipe-max-size (1 MiB as delivered) it takes CAP_SYS_RESOURCE
                self._room = fcntl.fcntl(self._write, _F_SETPIPE_SZ, pages * _PAGE) // _PAGE
                break
            except OSError:
                continue

    @property
    def most_pages(self) -> int:
        """Pages of the largest reply that is not copied twice: what READs are best limited to."""
        return min(_MOST_PAGES, self._room - _EXTRA)

    def close(self) -> None:
        """Close the pipe."""
        for fd in (self._read, self._write):
            if fd >= 0:
                os.close(fd)
        self._read = self._write = -1

    def _reset(self) -> None:
        self.close()
        self._make()

    def reply(self, device: int, unique: int, source: int, offset: int, length: int) -> None:
        """Answer request `unique` with `length` bytes at `offset` of `source`.

        Raises ShortReadError when the file does not give them (nothing was answered then), and OSError when
        the device does not take the reply: ENOENT if the request was interrupted.
        """
        if length > self.most_pages * _PAGE:
            self._copy(device, unique, source, offset, length)
            return
        header = OUT_HEADER.pack(OUT_HEADER.size + length, 0, unique)
        try:
            os.write(self._write, header)
            self._fill(source, offset, length)
            total = OUT_HEADER.size + length
            sent = os.splice(self._read, device, total)
            if sent != total:
                raise OSError(errno.EIO, f"the FUSE device took {sent} of {total} bytes")
        except OSError:
            self._reset()
            raise

    def _fill(self, source: int, offset: int, length: int) -> None:
        while length:
            try:
                moved = os.splice(source, self._write, length, offset_src=offset)
            except OSError as error:
                raise ShortReadError(error.errno, error.strerror) from error
            if moved == 0:
                raise ShortReadError(errno.EIO, "the data file is too short")
            offset += moved
            length -= moved

    def _copy(self, device: int, unique: int, source: int, offset: int, length: int) -> None:
        try:
            data = os.pread(source, length, offset)
        except OSError as error:
            raise ShortReadError(error.errno, error.strerror) from error
        if len(data) != length:
            raise ShortReadError(errno.EIO, "the data file is too short")
        os.writev(device, [OUT_HEADER.pack(OUT_HEADER.size + length, 0, unique), data])


class ThreadSplicers:
    """A Splicer for each thread that asks, closed all together."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._all: list[Splicer] = []

    @property
    def most_pages(self) -> int:
        """See Splicer.most_pages: the same for all."""
        return self.get().most_pages

    def get(self) -> Splicer:
        """That of this thread."""
        splicer: Splicer | None = getattr(self._local, "splicer", None)
        if splicer is None:
            splicer = self._local.splicer = Splicer()
            with self._lock:
                self._all.append(splicer)
        return splicer

    def close(self) -> None:
        """Close all; no thread may use one any more."""
        with self._lock:
            for splicer in self._all:
                splicer.close()
            self._all.clear()
