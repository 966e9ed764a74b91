"""Replies to the kernel that are written as they are, and what is counted and traced about all replies."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from dataclasses import dataclass

from fusecache_mount.device.open_files import OpenFiles
from fusecache_mount.device.trace_switch import TraceSwitch
from fusecache_mount.kernel import protocol

_log = logging.getLogger(__name__)


@dataclass
class ReadStats:
    """Bytes and requests answered by the daemon; `bytes_fetched` had to wait for a fetch."""

    reads: int = 0
    bytes_store: int = 0
    bytes_fetched: int = 0
    errors: int = 0


class ThreadReadStats:
    """A ReadStats for each thread, which that thread alone changes: counting takes no lock."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._all: list[ReadStats] = []

    def own(self) -> ReadStats:
        """The counters of this thread."""
        stats: ReadStats | None = getattr(self._local, "read_stats", None)
        if stats is None:
            stats = ReadStats()
            self._local.read_stats = stats
            self._all.append(stats)
        return stats

    def total(self) -> ReadStats:
        """The sum over all threads."""
        total = ReadStats()
        for stats in list(self._all):
            total.reads += stats.reads
            total.bytes_store += stats.bytes_store
            total.bytes_fetched += stats.bytes_fetched
            total.errors += stats.errors
        return total


class ReplyWriter:
    """Writes replies to the descriptor that their request was read from. Thread-safe: it holds no state but the
    counters of each thread, and no lock."""

    def __init__(self, open_files: OpenFiles, trace_switch: TraceSwitch, stats: ThreadReadStats) -> None:
        self._open_files = open_files
        self._trace_switch = trace_switch
        self._stats = stats

    def report_answer(self, unique: int, status: int, reply: bytes | bytearray = b"") -> None:
        """Tell the trace, if there is one, that a request was answered, with 0 or an errno."""
        if (observer := self._trace_switch.observer) is not None:
            observer.request_answered(unique, status, reply)

    def answer_done(self, descriptor: int, unique: int) -> None:
        """Answer that the request was carried out, without results: also an empty READ."""
        self.try_write(descriptor, protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size, 0, unique))
        self.report_answer(unique, 0)

    def refuse(self, descriptor: int, unique: int, error_number: int) -> None:
        """Answer with an error that is no failure."""
        self.try_write(descriptor, protocol.error_reply(unique, error_number))
        self.report_answer(unique, error_number)

    def fail(self, descriptor: int, unique: int, error_number: int) -> None:
        """Answer with an error, which counts as a failure unless the request was interrupted."""
        if error_number != errno.EINTR:
            self._stats.own().errors += 1
        self.refuse(descriptor, unique, error_number)

    def try_write(self, descriptor: int, reply: bytes) -> None:
        """Write a whole reply; a kernel that does not want it any more is no error."""
        # ENOENT: the request was interrupted; ENODEV: unmounted
        with contextlib.suppress(OSError):
            os.write(descriptor, reply)

    def write_reply(
        self, descriptor: int, opcode: int, nodeid: int, reply: bytes | bytearray, *, is_successful_open: bool
    ) -> None:
        """Give the kernel a reply that is not one to a READ. An open that it does not want any more is released."""
        try:
            os.write(descriptor, reply)
        except OSError as error:
            if is_successful_open and error.errno == errno.ENOENT:
                self._open_files.release(nodeid)  # interrupted: the kernel will not send RELEASE
            elif error.errno not in (errno.ENOENT, errno.ENODEV):
                _log.warning("the FUSE device refused a reply to request %d: %s", opcode, error.strerror)
