"""The device channel: threads between the kernel's FUSE device and pyfuse3.

READs are answered here, from the store, with the GIL released, RELEASE and IOCTL, which need nobody, and OPENs with
passthrough, each of which a load waits for; all other requests go to pyfuse3 through a SOCK_SEQPACKET pair, and a few
of its replies are rewritten on the way back (INIT, OPEN, and st_ino wherever it appears). Passthrough READs never come
here at all.

Invariants. A reply goes to the descriptor that its request was read from: each clone of the device has its own
table of requests under way. A READ is answered exactly once: by the thread that read it, by the thread that
landed its last block, or, after an interrupt, by the one that took it off the loader's list
(FetchService.cancel_waiter says
who won). No thread holds a lock while it reads, writes or splices.

Before a restart or an upgrade nothing is drained: whatever was read and not answered is sent again by the kernel
(FUSE_NOTIFY_RESEND) to the next daemon.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from fusecache.errors import FusecacheError
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.service import FetchService
from fusecache.fetch.waiter import Waiter
from fusecache_mount.device.splice import ShortReadError, ThreadSplicers
from fusecache_mount.device.trace_switch import TraceSwitch
from fusecache_mount.kernel import protocol
from fusecache_mount.kernel.errnos import errno_of
from fusecache_mount.kernel.nodeids import is_passthrough
from fusecache_mount.kernel.processes import ProcessLookup
from fusecache_mount.kernel.protocol import Opcode

_log = logging.getLogger(__name__)

_REQUEST_BUFFER_BYTES = 256 << 10
"""Room for the largest request of a read-only mount (setxattr, to be refused)."""
_SOCKET_BUFFER_BYTES = 4 << 20
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_MAX_READ_TRIES = 3


class OpenFiles(Protocol):
    """What the channel needs to know about open files. Thread-safe."""

    def get_object_fetch(self, nodeid: int) -> ObjectFetch:
        """The load behind a nodeid that is open. Raises FusecacheError."""

    def open_passthrough(self, nodeid: int) -> int:
        """Open a passthrough twin once more, if that is all there is to do; returns its backing, or 0: nothing was
        opened, and the request is pyfuse3's. May block on the store's disk."""

    def open_answered(self, nodeid: int) -> None:
        """The reply to `open_whole` is on its way: do what the open need not wait for. Does not block."""

    def backing_id(self, nodeid: int) -> int:
        """The passthrough backing of this nodeid, 0 for none."""

    def is_awaiting_attestation(self, nodeid: int) -> bool:
        """Whether opens of this nodeid wait until somebody vouches for the file, which may take as long as a fetch."""

    def release(self, nodeid: int) -> None:
        """One open less: it was closed, or never reached the kernel. Does not block."""


@dataclass
class ReadStats:
    """Bytes and requests answered by the daemon, one instance per thread; `fetched` had to wait for a fetch."""

    reads: int = 0
    bytes_store: int = 0
    bytes_fetched: int = 0
    errors: int = 0


@dataclass
class _ChannelThreads:
    stats_per_thread: list[ReadStats] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)


class DeviceChannel:
    """Serves `device` and its clones. `on_init(request, reply)` gets the INIT exchange, `on_end` is called once,
    from a thread, when the file system is unmounted or its connection was aborted."""

    def __init__(
        self,
        device: int,
        clones: Sequence[int],
        fetch_service: FetchService,
        open_files: OpenFiles,
        *,
        limits: protocol.InitLimits,
        requests_passthrough: bool,
        trace_switch: TraceSwitch,
        verify_always: bool = False,
        on_init: Callable[[bytes, bytes], None],
        on_end: Callable[[], None],
    ) -> None:
        self._trace_switch = trace_switch
        self._device = device
        self._descriptors = [device, *clones]
        self._fetch_service = fetch_service
        self._open_files = open_files
        self._requests_passthrough = requests_passthrough
        self._verify_always = verify_always
        self._on_init = on_init
        self._on_end = on_end
        self._pyfuse3_requests: dict[int, tuple[int, int, int]] = {}
        """unique -> descriptor, opcode, nodeid of what pyfuse3 has to answer. Single dict operations only."""
        self._abandoned_opens: set[int] = set()
        """unique of OPENs that were interrupted, and answered, while pyfuse3 still has them. Single operations only."""
        self._waiting_reads: dict[int, tuple[int, Waiter | None]] = {}
        """unique -> descriptor, waiter of READs that wait for the loader. Single dict operations only."""
        self._init_request = b""
        self._init_answered = threading.Event()
        self._ended = threading.Event()
        self._splicers = ThreadSplicers()
        self._process_lookup = ProcessLookup()
        self._limits = replace(limits, max_pages=min(limits.max_pages, self._splicers.max_reply_pages))
        self._channel_threads = _ChannelThreads()
        self._thread_local = threading.local()
        theirs, self._pyfuse3_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (theirs, self._pyfuse3_socket):
            for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
                with contextlib.suppress(PermissionError):
                    end.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
        theirs.setblocking(False)
        self._pyfuse3_fd = theirs.detach()

    @property
    def pyfuse3_path(self) -> str:
        """What to give pyfuse3.init() for a mountpoint: libfuse takes over the descriptor behind it."""
        return f"/dev/fd/{self._pyfuse3_fd}"

    # -- life

    def start(self, threads: int, replayed_init: bytes | None = None) -> None:
        """Serve with `threads` receivers. `replay` is the INIT request of an earlier daemon on this device: it is
        given to pyfuse3, and the kernel is asked to send again what that daemon left unanswered."""
        self._start_thread("reply", self._reply_loop)
        if replayed_init is not None:
            self._init_request = replayed_init
            self._pyfuse3_requests[protocol.IN_HEADER.unpack_from(replayed_init)[2]] = (-1, Opcode.INIT, 0)
            self._pyfuse3_socket.send(replayed_init)
            if not self._init_answered.wait(30):
                raise FusecacheError("pyfuse3 did not take over the connection")
        for number in range(threads):
            self._start_thread(
                f"read-{number}", self._receive_loop, self._descriptors[number % len(self._descriptors)]
            )
        if replayed_init is not None and protocol.supports_resend(replayed_init):
            with contextlib.suppress(OSError):
                os.write(self._device, protocol.resend_notification())

    def _start_thread(self, name: str, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, name=f"channel-{name}", daemon=True)
        self._channel_threads.threads.append(thread)
        thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """After the end: join the threads, for at most `timeout` seconds."""
        with contextlib.suppress(OSError):
            self._pyfuse3_socket.shutdown(socket.SHUT_RDWR)
        for thread in self._channel_threads.threads:
            thread.join(timeout)
        if not any(thread.is_alive() for thread in self._channel_threads.threads):
            self._splicers.close()
            self._pyfuse3_socket.close()

    @property
    def stats(self) -> ReadStats:
        """Sum over all threads."""
        total = ReadStats()
        for stats in list(self._channel_threads.stats_per_thread):
            total.reads += stats.reads
            total.bytes_store += stats.bytes_store
            total.bytes_fetched += stats.bytes_fetched
            total.errors += stats.errors
        return total

    @property
    def waiting_read_count(self) -> int:
        """READs that wait for the loader."""
        return len(self._waiting_reads)

    def _own_stats(self) -> ReadStats:
        stats: ReadStats | None = getattr(self._thread_local, "stats", None)
        if stats is None:
            stats = self._thread_local.stats = ReadStats()
            self._channel_threads.stats_per_thread.append(stats)
        return stats

    def invalidate_entry(self, parent: int, name: bytes) -> None:
        """Make the kernel look `name` up again. Blocks until the kernel has the directory's lock: never call it
        while a request of that directory waits for the caller."""
        try:
            os.write(self._device, protocol.inval_entry_notification(parent, name))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENODEV):
                _log.debug("notify: %s", error)

    @property
    def supports_expire(self) -> bool:
        """Whether the kernel can do what `expire_entries` asks for."""
        return protocol.supports_expire(self._init_request)

    def expire_entries(self, names: Sequence[tuple[int, bytes]], deadline: float) -> int:
        """Have the kernel look these names up again at their next use. Blocks while a directory is locked by a
        request; stops at `deadline`, a time.monotonic(). Returns how many it did not come to."""
        for done, (parent, name) in enumerate(names):
            if time.monotonic() > deadline:
                return len(names) - done
            with contextlib.suppress(OSError):  # ENOENT: the kernel does not know it (any more)
                os.write(self._device, protocol.inval_entry_notification(parent, name, expire_only=True))
        return 0

    # -- kernel -> pyfuse3

    def _receive_loop(self, descriptor: int) -> None:
        buffer = bytearray(_REQUEST_BUFFER_BYTES)
        view = memoryview(buffer)
        header, read_in = protocol.IN_HEADER, protocol.READ_IN
        while True:
            try:
                length = os.readv(descriptor, [buffer])
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue
                if error.errno != errno.ENODEV:
                    _log.error("the FUSE device failed: %s", error.strerror)
                self._report_end()
                return
            fields = header.unpack_from(buffer)
            _, opcode, unique, nodeid, _, _, pid, *_ = fields
            if (observer := self._trace_switch.observer) is not None:
                observer.request_received(fields, view[:length])
            if opcode == Opcode.READ:
                try:
                    self._answer_read(descriptor, unique, nodeid, pid, *read_in.unpack_from(buffer, 40)[1:])
                except Exception:
                    _log.exception("a READ failed in an unforeseen way")
                    self._answer_with_error(descriptor, unique, errno.EIO)
                continue
            if opcode == Opcode.RELEASE:
                self._open_files.release(nodeid)
                self._try_write(descriptor, protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size, 0, unique))
                self._report_answer(unique, 0)
                continue
            if opcode == Opcode.IOCTL:  # Python's open() asks of every file whether it is a terminal
                self._try_write(descriptor, protocol.error_reply(unique, errno.ENOTTY))
                self._report_answer(unique, errno.ENOTTY)
                continue
            if opcode == Opcode.INTERRUPT:
                self._interrupt_request(descriptor, unique, protocol.INTERRUPT_IN.unpack_from(buffer, 40)[0])
                continue
            if opcode == Opcode.OPEN and is_passthrough(nodeid):
                try:
                    if self._answer_open(
                        descriptor, unique, nodeid, protocol.OPEN_IN.unpack_from(buffer, 40)[0]
                    ):
                        continue
                except Exception:
                    _log.exception("an OPEN failed in an unforeseen way")
                    self._answer_with_error(descriptor, unique, errno.EIO)
                    continue
            if opcode == Opcode.INIT:
                self._init_request = bytes(view[:length])
            if opcode not in protocol.OPCODES_WITHOUT_REPLY:
                self._pyfuse3_requests[unique] = (descriptor, opcode, nodeid)
            try:
                self._pyfuse3_socket.send(view[:length])
            except OSError:
                self._report_end()
                return

    def _report_answer(self, unique: int, status: int, reply: bytes | bytearray = b"") -> None:
        if (observer := self._trace_switch.observer) is not None:
            observer.request_answered(unique, status, reply)

    def _report_end(self) -> None:
        if not self._ended.is_set():
            self._ended.set()
            self._on_end()

    def _interrupt_request(self, descriptor: int, unique: int, target_unique: int) -> None:
        found = self._waiting_reads.get(target_unique)
        if found is not None and found[1] is not None:
            if self._fetch_service.cancel_waiter(found[1]):
                self._waiting_reads.pop(target_unique, None)
                self._answer_with_error(found[0], target_unique, errno.EINTR)
        elif (pending := self._pyfuse3_requests.get(target_unique)) is not None:
            self._interrupt_open(target_unique, *pending)
        else:
            # the READ is just being taken up or answered in another thread: ask again
            self._try_write(descriptor, protocol.error_reply(unique, errno.EAGAIN))

    def _interrupt_open(self, unique: int, descriptor: int, opcode: int, nodeid: int) -> None:
        """Let go of who waits for an open that may take long. What pyfuse3 answers later is for nobody (see `_reply`);
        when it answers just now, the kernel takes the first answer, and the other one fails with ENOENT."""
        if opcode != Opcode.OPEN or not self._open_files.is_awaiting_attestation(nodeid):
            return
        self._abandoned_opens.add(unique)
        self._try_write(descriptor, protocol.error_reply(unique, errno.EINTR))
        if unique not in self._pyfuse3_requests:
            self._abandoned_opens.discard(unique)

    # -- OPEN

    def _answer_open(self, descriptor: int, unique: int, nodeid: int, flags: int) -> bool:
        """Answer an open with passthrough; False: pyfuse3 has to. While somebody traces, it always does."""
        if self._trace_switch.is_on or flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            return False
        backing = self._open_files.open_passthrough(nodeid)
        if not backing:
            return False
        reply = protocol.open_reply(unique, nodeid, backing)
        self._write_reply(descriptor, Opcode.OPEN, nodeid, reply, is_successful_open=True)
        self._open_files.open_answered(nodeid)
        return True

    def _write_reply(
        self, descriptor: int, opcode: int, nodeid: int, reply: bytes | bytearray, *, is_successful_open: bool
    ) -> None:
        """Give the kernel a reply that is not one to a READ; `opened`: to an open that succeeded."""
        try:
            os.write(descriptor, reply)
        except OSError as error:
            if is_successful_open and error.errno == errno.ENOENT:
                self._open_files.release(nodeid)  # interrupted: the kernel will not send RELEASE
            elif error.errno not in (errno.ENOENT, errno.ENODEV):
                _log.warning("the FUSE device refused a reply to request %d: %s", opcode, error.strerror)

    # -- READ

    def _answer_read(
        self, descriptor: int, unique: int, nodeid: int, tid: int, offset: int, size: int
    ) -> None:
        try:
            object_fetch = self._open_files.get_object_fetch(nodeid)
            if object_fetch.model is not None:
                object_fetch.record_read(offset, size, self._process_lookup.process_id_of(tid))
            length = min(size, object_fetch.version.size - offset)
            if length <= 0:
                self._try_write(descriptor, protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size, 0, unique))
                self._report_answer(unique, 0)
                return
            if (
                object_fetch.fetch_whole
                and object_fetch.stored.is_range_servable(offset, length)
                and not self._verify_always
            ):
                self._answer_from_store(object_fetch, descriptor, unique, offset, length, was_fetched=False)
            else:
                self._request_bytes(
                    object_fetch, descriptor, unique, offset, length, tries_left=_MAX_READ_TRIES
                )
        except FusecacheError as error:
            self._answer_with_error(descriptor, unique, errno_of(error))

    def _request_bytes(
        self,
        object_fetch: ObjectFetch,
        descriptor: int,
        unique: int,
        offset: int,
        length: int,
        tries_left: int,
    ) -> None:
        """Ask the loader for the bytes and answer, now or when they are there."""
        if self._verify_always:
            self._suspect_present_blocks(object_fetch, offset, length)
        self._waiting_reads[unique] = (descriptor, None)

        def settled(waiter: Waiter) -> None:
            self._waiting_reads.pop(unique, None)
            if waiter.error is not None:
                self._answer_with_error(descriptor, unique, errno_of(waiter.error))
            elif waiter.pieces:
                data = self._fetch_service.copy_bytes(object_fetch, offset, length, waiter.pieces)
                if data is None:
                    self._answer_with_error(descriptor, unique, errno.EIO)
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
            waiter = self._fetch_service.request_bytes(object_fetch, offset, length, settled)
        except BaseException:
            self._waiting_reads.pop(unique, None)
            raise
        if waiter is None:
            self._waiting_reads.pop(unique, None)
            self._answer_from_store(
                object_fetch, descriptor, unique, offset, length, was_fetched=False, tries_left=tries_left - 1
            )
        elif unique in self._waiting_reads:
            # settled() may have run in between, and then this entry would stay: put it only over the placeholder
            self._waiting_reads[unique] = (descriptor, waiter)
            if not self._fetch_service.is_waiting(waiter):
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
        tries_left: int = _MAX_READ_TRIES,
    ) -> None:
        stats = self._own_stats()
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
                self._answer_with_error(descriptor, unique, errno.EIO)
            else:
                self._report_answer(unique, errno.EINTR)
            return
        self._report_answer(unique, 0)
        stats.reads += 1
        if was_fetched:
            stats.bytes_fetched += length
        else:
            stats.bytes_store += length

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
            self._answer_with_error(descriptor, unique, errno.EIO)
            return
        self._suspect_present_blocks(object_fetch, offset, length)
        try:
            self._request_bytes(object_fetch, descriptor, unique, offset, length, tries_left)
        except FusecacheError as error:
            self._answer_with_error(descriptor, unique, errno_of(error))

    def _suspect_present_blocks(self, object_fetch: ObjectFetch, offset: int, length: int) -> None:
        size = object_fetch.stored.block_size
        for block in range(offset // size, (offset + length - 1) // size + 1):
            if object_fetch.stored.is_present(block):
                self._fetch_service.recheck_block(object_fetch, block)

    def _answer_with_bytes(self, descriptor: int, unique: int, data: bytes) -> None:
        header = protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size + len(data), 0, unique)
        with contextlib.suppress(OSError):
            os.writev(descriptor, [header, data])
        self._report_answer(unique, 0)
        stats = self._own_stats()
        stats.reads += 1
        stats.bytes_fetched += len(data)

    def _answer_with_error(self, descriptor: int, unique: int, error_number: int) -> None:
        if error_number != errno.EINTR:
            self._own_stats().errors += 1
        self._try_write(descriptor, protocol.error_reply(unique, error_number))
        self._report_answer(unique, error_number)

    def _try_write(self, descriptor: int, reply: bytes) -> None:
        # ENOENT: the request was interrupted; ENODEV: unmounted
        with contextlib.suppress(OSError):
            os.write(descriptor, reply)

    # -- pyfuse3 -> kernel

    def _reply_loop(self) -> None:
        buffer = bytearray(_SOCKET_BUFFER_BYTES)
        view = memoryview(buffer)
        while True:
            try:
                length = self._pyfuse3_socket.recv_into(buffer)
            except OSError:
                return
            if length < protocol.OUT_HEADER.size:
                return
            try:
                self._forward_reply(bytearray(view[:length]))
            except Exception:
                _log.exception("a reply failed in an unforeseen way")

    def _forward_reply(self, reply: bytearray) -> None:
        _, status, unique = protocol.OUT_HEADER.unpack_from(reply)
        descriptor, opcode, nodeid = self._pyfuse3_requests.pop(unique, (self._device, 0, 0))
        if unique in self._abandoned_opens:
            self._abandoned_opens.discard(unique)
            if status == 0:
                self._open_files.release(nodeid)
            return
        if opcode == Opcode.INIT:
            asked = self._requests_passthrough and protocol.supports_passthrough(self._init_request)
            protocol.rewrite_init(reply, self._limits, passthrough=asked)
            if descriptor >= 0:
                os.write(descriptor, reply)
                self._on_init(self._init_request, bytes(reply))
            self._init_answered.set()
            return
        if self._trace_switch.is_on:
            protocol.rewrite_as_uncached(reply, opcode)
            self._report_answer(unique, status, reply)
        opened = opcode == Opcode.OPEN and status == 0
        if opened:
            if is_passthrough(nodeid):
                protocol.rewrite_open(reply, self._open_files.backing_id(nodeid))
        elif opcode in (Opcode.LOOKUP, Opcode.GETATTR, Opcode.READDIRPLUS):
            protocol.rewrite_inode_numbers(reply, opcode)
        self._write_reply(descriptor, opcode, nodeid, reply, is_successful_open=opened)
