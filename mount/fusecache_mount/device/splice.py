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

from fusecache_mount.kernel.protocol import MAX_READ_PAGES, OUT_HEADER, PAGE_BYTES

_F_SETPIPE_SZ = 1031
_EXTRA_PIPE_PAGES = 2
"""Slots of the pipe besides: the header, and one more page where the offset is not aligned."""


class ShortReadError(OSError):
    """The data file ended, or broke, before the bytes that the store says it has."""


class Splicer:
    """Writes replies to FUSE descriptors, through a pipe that is empty between two replies; `close` it. Of one
    thread."""

    def __init__(self) -> None:
        self._pipe_output = self._pipe_input = -1
        self._pipe_pages = 0
        self._open_pipe()

    def _open_pipe(self) -> None:
        self._pipe_output, self._pipe_input = os.pipe2(os.O_CLOEXEC)
        self._pipe_pages = 16
        for pages in (2 * MAX_READ_PAGES, MAX_READ_PAGES, MAX_READ_PAGES // 4):
            try:
                # a power of two; beyond fs.pipe-max-size (1 MiB as delivered) it takes CAP_SYS_RESOURCE
                self._pipe_pages = (
                    fcntl.fcntl(self._pipe_input, _F_SETPIPE_SZ, pages * PAGE_BYTES) // PAGE_BYTES
                )
                break
            except OSError:
                continue

    @property
    def max_reply_pages(self) -> int:
        """Pages of the largest reply that is not copied twice: what READs are best limited to."""
        return min(MAX_READ_PAGES, self._pipe_pages - _EXTRA_PIPE_PAGES)

    def close(self) -> None:
        """Close the pipe."""
        for fd in (self._pipe_output, self._pipe_input):
            if fd >= 0:
                os.close(fd)
        self._pipe_output = self._pipe_input = -1

    def _reopen_pipe(self) -> None:
        self.close()
        self._open_pipe()

    def send_reply(self, device_fd: int, unique: int, data_fd: int, offset: int, length: int) -> None:
        """Answer request `unique` with `length` bytes at `offset` of `data_fd`.

        Raises ShortReadError when the file does not give them (nothing was answered then), and OSError when
        the device does not take the reply: ENOENT if the request was interrupted.
        """
        if length > self.max_reply_pages * PAGE_BYTES:
            self._send_copied_reply(device_fd, unique, data_fd, offset, length)
            return
        header = OUT_HEADER.pack(OUT_HEADER.size + length, 0, unique)
        try:
            os.write(self._pipe_input, header)
            self._fill_pipe(data_fd, offset, length)
            total = OUT_HEADER.size + length
            sent = os.splice(self._pipe_output, device_fd, total)
            if sent != total:
                raise OSError(errno.EIO, f"the FUSE device took {sent} of {total} bytes")
        except OSError:
            self._reopen_pipe()
            raise

    def _fill_pipe(self, data_fd: int, offset: int, length: int) -> None:
        while length:
            try:
                moved = os.splice(data_fd, self._pipe_input, length, offset_src=offset)
            except OSError as error:
                raise ShortReadError(error.errno, error.strerror) from error
            if moved == 0:
                raise ShortReadError(errno.EIO, "the data file is too short")
            offset += moved
            length -= moved

    def _send_copied_reply(self, device_fd: int, unique: int, data_fd: int, offset: int, length: int) -> None:
        try:
            data = os.pread(data_fd, length, offset)
        except OSError as error:
            raise ShortReadError(error.errno, error.strerror) from error
        if len(data) != length:
            raise ShortReadError(errno.EIO, "the data file is too short")
        os.writev(device_fd, [OUT_HEADER.pack(OUT_HEADER.size + length, 0, unique), data])


class ThreadSplicers:
    """A Splicer for each thread that asks, closed all together. `_lock` guards the list of all; a thread finds its own
    without it."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._splicers: list[Splicer] = []

    @property
    def max_reply_pages(self) -> int:
        """Pages of the largest reply that is not copied twice, which is the same for all threads."""
        return self.get_splicer().max_reply_pages

    def get_splicer(self) -> Splicer:
        """The splicer of this thread."""
        splicer: Splicer | None = getattr(self._local, "splicer", None)
        if splicer is None:
            splicer = self._local.splicer = Splicer()
            with self._lock:
                self._splicers.append(splicer)
        return splicer

    def close(self) -> None:
        """Close all; no thread may use one any more."""
        with self._lock:
            for splicer in self._splicers:
                splicer.close()
            self._splicers.clear()
