"""The device channel: threads between the kernel's FUSE device and pyfuse3.

Each thread reads requests from its own clone of the device, and answers some of them itself: READs, from the store,
with the GIL released (ReadAnswerer); RELEASE and IOCTL, which need nobody; and OPENs with passthrough, each of which a
load waits for. All others go to pyfuse3 (Pyfuse3Relay). Passthrough READs never come here at all.

Invariants. A reply goes to the descriptor that its request was read from: each clone of the device has its own
table of requests under way. No thread holds a lock while it reads, writes or splices.

Before a restart or an upgrade nothing is drained: whatever was read and not answered is sent again by the kernel
(FUSE_NOTIFY_RESEND) to the next daemon.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from fusecache.fetch.read_observer import ReadObserver
from fusecache.fetch.service import FetchService
from fusecache_mount.device.init_exchange import InitExchange
from fusecache_mount.device.kernel_notifier import KernelNotifier
from fusecache_mount.device.open_files import OpenFiles
from fusecache_mount.device.pyfuse3_relay import Pyfuse3Relay
from fusecache_mount.device.read_answerer import ReadAnswerer
from fusecache_mount.device.reply_writer import ReadStats, ReplyWriter, ThreadReadStats
from fusecache_mount.device.splice import ThreadSplicers
from fusecache_mount.device.trace_switch import TraceSwitch
from fusecache_mount.kernel import protocol
from fusecache_mount.kernel.nodeids import is_passthrough
from fusecache_mount.kernel.protocol import Opcode

_log = logging.getLogger(__name__)

_REQUEST_BUFFER_BYTES = 256 << 10
"""Room for the largest request of a read-only mount (setxattr, to be refused)."""
_READ, _OPEN, _RELEASE, _IOCTL, _INTERRUPT = (
    int(opcode) for opcode in (Opcode.READ, Opcode.OPEN, Opcode.RELEASE, Opcode.IOCTL, Opcode.INTERRUPT)
)
"""Plain numbers: every request is compared with them, and an enum compares six times as slowly."""


class DeviceChannel:
    """Serves the `descriptors`, the device and its clones. Built by `build_channel`.

    | From | By | To |
    |---|---|---|
    | built | `start` | serving, after pyfuse3 took over what an earlier daemon left |
    | serving | the file system is unmounted, the connection aborted, pyfuse3 gone | ended: `on_end` is called, once |
    | ended | `close` | closed |
    """

    def __init__(
        self,
        descriptors: Sequence[int],
        open_files: OpenFiles,
        *,
        reads: ReadAnswerer,
        relay: Pyfuse3Relay,
        notifier: KernelNotifier,
        writer: ReplyWriter,
        splicers: ThreadSplicers,
        stats: ThreadReadStats,
        trace_switch: TraceSwitch,
        on_end: Callable[[], None],
    ) -> None:
        self._descriptors = descriptors
        self._open_files = open_files
        self._reads = reads
        self._relay = relay
        self.notifier = notifier
        self._writer = writer
        self._splicers = splicers
        self._stats = stats
        self._trace_switch = trace_switch
        self._on_end = on_end
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def pyfuse3_path(self) -> str:
        """The mountpoint for pyfuse3.init(), which is a descriptor that looks like the device."""
        return self._relay.pyfuse3_path

    @property
    def stats(self) -> ReadStats:
        """READs that the daemon answered, of all threads."""
        return self._stats.total()

    @property
    def waiting_read_count(self) -> int:
        """READs that wait for bytes."""
        return self._reads.waiting_read_count

    def start(self, threads: int, replayed_init: bytes | None = None) -> None:
        """Serve with `threads` receivers. `replayed_init` is the INIT request of an earlier daemon on this device: it
        is given to pyfuse3, and the kernel is asked to send again what that daemon left unanswered. Blocks until
        pyfuse3 took over. Raises FusecacheError when it does not."""
        self._start_thread("reply", self._relay.run_reply_loop)
        if replayed_init is not None:
            self._relay.replay_init(replayed_init)
        for number in range(threads):
            descriptor = self._descriptors[number % len(self._descriptors)]
            self._start_thread(f"read-{number}", self._run_receive_loop, descriptor)
        if replayed_init is not None:
            self.notifier.request_resend()

    def close(self, timeout: float = 5.0) -> None:
        """After the end: join the threads, for at most `timeout` seconds each."""
        self._relay.shut_down()
        for thread in self._threads:
            thread.join(timeout)
        if not any(thread.is_alive() for thread in self._threads):
            self._splicers.close()
            self._relay.close()

    def _start_thread(self, name: str, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, name=f"channel-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run_receive_loop(self, descriptor: int) -> None:
        buffer = bytearray(_REQUEST_BUFFER_BYTES)
        view = memoryview(buffer)
        unpack_header, unpack_read = protocol.IN_HEADER.unpack_from, protocol.READ_IN.unpack_from
        body_offset = protocol.IN_HEADER.size
        trace_switch, answer_read = self._trace_switch, self._reads.answer_read
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
            if length < body_offset:  # not the kernel's: it gives whole requests
                self._report_end()
                return
            fields = unpack_header(buffer)
            _, opcode, unique, nodeid, _, _, tid, *_ = fields
            if (observer := trace_switch.observer) is not None:
                observer.request_received(fields, view[:length])
            try:
                if opcode == _READ:
                    _, offset, size = unpack_read(buffer, body_offset)
                    answer_read(descriptor, unique, nodeid, tid, offset, size)
                    continue
                if self._answer_request(descriptor, opcode, unique, nodeid, view[body_offset:length]):
                    continue
            except Exception:
                _log.exception("request %d failed in an unforeseen way", opcode)
                self._writer.fail(descriptor, unique, errno.EIO)
                continue
            try:
                self._relay.forward_request(descriptor, opcode, unique, nodeid, view[:length])
            except OSError:
                self._report_end()
                return

    def _answer_request(
        self, descriptor: int, opcode: int, unique: int, nodeid: int, arguments: memoryview
    ) -> bool:
        """Answer a request here, if that is possible; False: it is pyfuse3's."""
        if opcode == _RELEASE:
            self._open_files.release(nodeid)
            self._writer.answer_done(descriptor, unique)
        elif opcode == _IOCTL:  # Python's open() asks of every file whether it is a terminal
            self._writer.refuse(descriptor, unique, errno.ENOTTY)
        elif opcode == _INTERRUPT:
            self._interrupt_request(descriptor, unique, protocol.INTERRUPT_IN.unpack_from(arguments)[0])
        elif opcode == _OPEN and is_passthrough(nodeid):
            flags, _ = protocol.OPEN_IN.unpack_from(arguments)
            return self._answer_open(descriptor, unique, nodeid, flags)
        else:
            return False
        return True

    def _interrupt_request(self, descriptor: int, unique: int, target_unique: int) -> None:
        if not self._reads.interrupt(target_unique) and not self._relay.interrupt(target_unique):
            # the READ is just being taken up or answered in another thread: ask again
            self._writer.try_write(descriptor, protocol.error_reply(unique, errno.EAGAIN))

    def _answer_open(self, descriptor: int, unique: int, nodeid: int, flags: int) -> bool:
        """Answer an open with passthrough; False: pyfuse3 has to. While somebody traces, it always does."""
        if self._trace_switch.is_on or flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            return False
        backing_id = self._open_files.open_passthrough(nodeid)
        if not backing_id:
            return False
        reply = protocol.open_reply(unique, nodeid, backing_id)
        self._writer.write_reply(descriptor, _OPEN, nodeid, reply, is_successful_open=True)
        self._open_files.open_answered(nodeid)
        return True

    def _report_end(self) -> None:
        if not self._ended.is_set():
            self._ended.set()
            self._on_end()


def build_channel(
    device_fd: int,
    clone_fds: Sequence[int],
    fetch_service: FetchService,
    open_files: OpenFiles,
    *,
    limits: protocol.InitLimits,
    requests_passthrough: bool,
    trace_switch: TraceSwitch,
    read_observer: ReadObserver,
    verify_always: bool = False,
    on_init: Callable[[bytes, bytes], None],
    on_end: Callable[[], None],
) -> DeviceChannel:
    """Put the parts of a channel together. `on_init(request, reply)` gets the INIT exchange of a new connection,
    `on_end` is called once, from a thread, when the file system is unmounted or its connection was aborted."""
    splicers = ThreadSplicers()
    limits = replace(limits, max_pages=min(limits.max_pages, splicers.max_reply_pages))
    init_exchange = InitExchange(limits, requests_passthrough=requests_passthrough)
    stats = ThreadReadStats()
    writer = ReplyWriter(open_files, trace_switch, stats)
    return DeviceChannel(
        [device_fd, *clone_fds],
        open_files,
        reads=ReadAnswerer(
            fetch_service,
            open_files,
            writer,
            read_observer=read_observer,
            splicers=splicers,
            stats=stats,
            verify_always=verify_always,
        ),
        relay=Pyfuse3Relay(
            device_fd,
            open_files,
            writer,
            init_exchange=init_exchange,
            trace_switch=trace_switch,
            on_init=on_init,
        ),
        notifier=KernelNotifier(device_fd, init_exchange),
        writer=writer,
        splicers=splicers,
        stats=stats,
        trace_switch=trace_switch,
        on_end=on_end,
    )
