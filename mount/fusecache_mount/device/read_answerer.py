"""READs, answered from the store with the GIL released, or when their last block has arrived.

A READ is answered exactly once: by the thread that read it, by the thread that brought its last block, or, after an
interrupt, by the thread whose `cancel_waiter` took its waiter away from the fetch service. No thread holds a lock
while it reads, writes or splices.

| A READ | By | It is |
|---|---|---|
| read from the device | all of it is in the store and verified | answered |
| read from the device | something is missing | about to wait: a placeholder without a waiter |
| about to wait | the fetch service returned a waiter | waiting |
| about to wait, waiting | its last block arrived, or can't be had | answered |
| waiting | INTERRUPT, and the waiter was still there to cancel | answered, with EINTR |
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os

from fusecache.errors import FusecacheError
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.read_observer import ReadObserver
from fusecache.fetch.service import FetchService
from fusecache.fetch.waiter import Waiter
from fusecache_mount.device.open_files import OpenFiles
from fusecache_mount.device.reply_writer import ReplyWriter, ThreadReadStats
from fusecache_mount.device.splice import ShortReadError, ThreadSplicers
from fusecache_mount.kernel import protocol
from fusecache_mount.kernel.errnos import errno_of
from fusecache_mount.kernel.processes import ProcessLookup

_log = logging.getLogger(__name__)

_MAX_TRIES = 3


class ReadAnswerer:
    """Answers READs, in the channel's threads and in those that bring blocks. Thread-safe; `_waiting_reads` is used by
    single dictionary operations, without a lock. With `verify_always` every block is hashed again for every READ."""

    def __init__(
        self,
        fetch_service: FetchService,
        open_files: OpenFiles,
        writer: ReplyWriter,
        *,
        read_observer: ReadObserver,
        splicers: ThreadSplicers,
        stats: ThreadReadStats,
        verify_always: bool,
    ) -> None:
        self._fetch_service = fetch_service
        self._open_files = open_files
        self._writer = writer
        self._read_observer = read_observer
        self._splicers = splicers
        self._stats = stats
        self._verify_always = verify_always
        self._process_lookup = ProcessLookup()
        self._waiting_reads: dict[int, tuple[int, Waiter | None]] = {}
        """unique -> descriptor, and waiter (None: the fetch service is just being asked)."""

    @property
    def waiting_read_count(self) -> int:
        """READs that wait for bytes."""
        return len(self._waiting_reads)

    def answer_read(
        self, descriptor: int, unique: int, nodeid: int, tid: int, offset: int, size: int
    ) -> None:
        """Answer a READ now, or have it answered later. Does not block on fetches; may on the disk."""
        try:
            object_fetch = self._open_files.get_object_fetch(nodeid)
            if self._read_observer.observes_reads(object_fetch):
                process_id = self._process_lookup.process_id_of(tid)
                self._read_observer.read(object_fetch, offset, size, process_id)
            length = min(size, object_fetch.version.size - offset)
            if length <= 0:
                self._writer.answer_done(descriptor, unique)
                return
            if (
                object_fetch.fetch_whole
                and object_fetch.stored.is_range_servable(offset, length)
                and not self._verify_always
            ):
                self._answer_from_store(object_fetch, descriptor, unique, offset, length, was_fetched=False)
            else:
                self._request_bytes(object_fetch, descriptor, unique, offset, length, tries_left=_MAX_TRIES)
        except FusecacheError as error:
            self._writer.fail(descriptor, unique, errno_of(error))

    def interrupt(self, unique: int) -> bool:
        """Let the reader of a READ go that waits. False: no READ waits by this number; it may be about to."""
        descriptor, waiter = self._waiting_reads.get(unique, (-1, None))
        if waiter is None:
            return False
        if self._fetch_service.cancel_waiter(waiter):
            self._waiting_reads.pop(unique, None)
            self._writer.fail(descriptor, unique, errno.EINTR)
        return True

    def _request_bytes(
        self,
        object_fetch: ObjectFetch,
        descriptor: int,
        unique: int,
        offset: int,
        length: int,
        tries_left: int,
    ) -> None:
        """Ask for the bytes, and answer now or when they are there. Raises FusecacheError."""
        if self._verify_always:
            self._suspect_present_blocks(object_fetch, offset, length)
        self._waiting_reads[unique] = (descriptor, None)

        def answer_settled(waiter: Waiter) -> None:
            self._waiting_reads.pop(unique, None)
            if waiter.error is not None:
                self._writer.fail(descriptor, unique, errno_of(waiter.error))
            elif waiter.pieces:
                data = self._fetch_service.copy_bytes(object_fetch, offset, length, waiter.pieces)
                if data is None:
                    self._writer.fail(descriptor, unique, errno.EIO)
                else:
                    self._answer_with_bytes(descriptor, unique, data)
            else:
                self._answer_from_store(
                    object_fetch,
                    descriptor,
                    unique,
                    offset,
                    length,
                    was_fetched=True,
                    tries_left=tries_left - 1,
                )

        try:
            waiter = self._fetch_service.request_bytes(object_fetch, offset, length, answer_settled)
        except BaseException:
            self._waiting_reads.pop(unique, None)
            raise
        if waiter is None:
            self._waiting_reads.pop(unique, None)
            self._answer_from_store(
                object_fetch, descriptor, unique, offset, length, was_fetched=False, tries_left=tries_left - 1
            )
        elif unique in self._waiting_reads:
            # answer_settled may have run in between, and then this entry would stay: only replace the placeholder
            self._waiting_reads[unique] = (descriptor, waiter)
            if not self._fetch_service.waiters.is_waiting(waiter):
                self._waiting_reads.pop(unique, None)

    def _answer_from_store(
        self,
        object_fetch: ObjectFetch,
        descriptor: int,
        unique: int,
        offset: int,
        length: int,
        *,
        was_fetched: bool,
        tries_left: int = _MAX_TRIES,
    ) -> None:
        try:
            self._splicers.get_splicer().send_reply(
                descriptor, unique, object_fetch.stored.fileno(), offset, length
            )
        except ShortReadError as error:
            _log.warning("%s: the cache did not give its bytes: %s", object_fetch.version.key, error.strerror)
            self._retry_read(object_fetch, descriptor, unique, offset, length, tries_left)
            return
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                _log.warning("the FUSE device refused a reply: %s", error)
                self._writer.fail(descriptor, unique, errno.EIO)
            else:
                self._writer.report_answer(unique, errno.EINTR)
            return
        self._writer.report_answer(unique, 0)
        stats = self._stats.own()
        stats.reads += 1
        if was_fetched:
            stats.bytes_fetched += length
        else:
            stats.bytes_store += length

    def _answer_with_bytes(self, descriptor: int, unique: int, data: bytes) -> None:
        header = protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size + len(data), 0, unique)
        with contextlib.suppress(OSError):
            os.writev(descriptor, [header, data])
        self._writer.report_answer(unique, 0)
        stats = self._stats.own()
        stats.reads += 1
        stats.bytes_fetched += len(data)

    def _retry_read(
        self,
        object_fetch: ObjectFetch,
        descriptor: int,
        unique: int,
        offset: int,
        length: int,
        tries_left: int,
    ) -> None:
        """A block that should be in the store can't be read: have it checked, and fetched anew."""
        if tries_left <= 0:
            self._writer.fail(descriptor, unique, errno.EIO)
            return
        self._suspect_present_blocks(object_fetch, offset, length)
        try:
            self._request_bytes(object_fetch, descriptor, unique, offset, length, tries_left)
        except FusecacheError as error:
            self._writer.fail(descriptor, unique, errno_of(error))

    def _suspect_present_blocks(self, object_fetch: ObjectFetch, offset: int, length: int) -> None:
        size = object_fetch.stored.block_size
        for block in range(offset // size, (offset + length - 1) // size + 1):
            if object_fetch.stored.is_present(block):
                self._fetch_service.recheck_block(object_fetch, block)
