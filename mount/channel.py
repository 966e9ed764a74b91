"""The device channel: threads between the kernel's FUSE device and pyfuse3.

READs are answered here, from the store, with the GIL released, RELEASE and IOCTL, which need nobody, and OPENs with
passthrough, each of which a load waits for; all other requests go to pyfuse3 through a SOCK_SEQPACKET pair, and a few
of its replies are rewritten on the way back (INIT, OPEN, and st_ino wherever it appears). Passthrough READs never come
here at all.

Invariants. A reply goes to the descriptor that its request was read from: each clone of the device has its own
table of requests under way. A READ is answered exactly once: by the thread that read it, by the thread that
landed its last block, or, after an interrupt, by the one that took it off the loader's list (Loader.cancel says
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
from fusecache.loader.load import ObjectLoad
from fusecache.loader.loader import Loader
from fusecache.loader.waiters import Waiter
from fusecache.mount import protocol
from fusecache.mount.errnos import errno_of
from fusecache.mount.nodeids import is_passthrough
from fusecache.mount.processes import Processes
from fusecache.mount.splice import ShortReadError, ThreadSplicers
from fusecache.mount.trace import Tracer

_log = logging.getLogger(__name__)

_REQUEST_BYTES = 256 << 10
"""Room for the largest request of a read-only mount (setxattr, to be refused)."""
_PAIR_BYTES = 4 << 20
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_TRIES = 3


class OpenFiles(Protocol):
    """What the channel needs to know about open files. Thread-safe."""

    def reading(self, nodeid: int) -> ObjectLoad:
        """The load behind a nodeid that is open. Raises FusecacheError."""

    def open_whole(self, nodeid: int) -> int:
        """Open a passthrough twin once more, if that is all there is to do; returns its backing, or 0: nothing was
        opened, and the request is pyfuse3's. May block on the store's disk."""

    def opened(self, nodeid: int) -> None:
        """The reply to `open_whole` is on its way: do what the open need not wait for. Does not block."""

    def backing_id(self, nodeid: int) -> int:
        """The passthrough backing of this nodeid, 0 for none."""

    def at_gate(self, nodeid: int) -> bool:
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
class _Threads:
    stats: list[ReadStats] = field(default_factory=list)
    all: list[threading.Thread] = field(default_factory=list)


class Channel:
    """Serves `device` and its clones. `on_init(request, reply)` gets the INIT exchange, `on_end` is called once,
    from a thread, when the file system is unmounted or its connection was aborted."""

    def __init__(
        self,
        device: int,
        clones: Sequence[int],
        loader: Loader,
        files: OpenFiles,
        *,
        limits: protocol.Limits,
        passthrough: bool,
        verify_always: bool = False,
        on_init: Callable[[bytes, bytes], None],
        on_end: Callable[[], None],
    ) -> None:
        self.tracer: Tracer | None = None
        """Set while somebody traces: it is told of every request, and the kernel keeps no answers."""
        self._device = device
        self._descriptors = [device, *clones]
        self._loader = loader
        self._files = files
        self._passthrough = passthrough
        self._verify_always = verify_always
        self._on_init = on_init
        self._on_end = on_end
        self._pending: dict[int, tuple[int, int, int]] = {}
        """unique -> descriptor, opcode, nodeid of what pyfuse3 has to answer. Single dict operations only."""
        self._given_up: set[int] = set()
        """unique of OPENs that were interrupted, and answered, while pyfuse3 still has them. Single operations only."""
        self._waiting: dict[int, tuple[int, Waiter | None]] = {}
        """unique -> descriptor, waiter of READs that wait for the loader. Single dict operations only."""
        self._init_request = b""
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._splicers = ThreadSplicers()
        self._processes = Processes()
        self._limits = replace(limits, max_pages=min(limits.max_pages, self._splicers.most_pages))
        self._threads = _Threads()
        self._stats_local = threading.local()
        theirs, self._pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (theirs, self._pair):
            for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
                with contextlib.suppress(PermissionError):
                    end.setsockopt(socket.SOL_SOCKET, option, _PAIR_BYTES)
        theirs.setblocking(False)
        self._theirs = theirs.detach()

    @property
    def pyfuse3_path(self) -> str:
        """What to give pyfuse3.init() for a mountpoint: libfuse takes over the descriptor behind it."""
        return f"/dev/fd/{self._theirs}"

    # -- life

    def start(self, threads: int, replay: bytes | None = None) -> None:
        """Serve with `threads` receivers. `replay` is the INIT request of an earlier daemon on this device: it is
        given to pyfuse3, and the kernel is asked to send again what that daemon left unanswered."""
        self._thread("reply", self._reply_loop)
        if replay is not None:
            self._init_request = replay
            self._pending[protocol.IN_HEADER.unpack_from(replay)[2]] = (-1, protocol.INIT, 0)
            self._pair.send(replay)
            if not self._ready.wait(30):
                raise FusecacheError("pyfuse3 did not take over the connection")
        for number in range(threads):
            self._thread(
                f"read-{number}", self._receive_loop, self._descriptors[number % len(self._descriptors)]
            )
        if replay is not None and protocol.can_resend(replay):
            with contextlib.suppress(OSError):
                os.write(self._device, protocol.resend())

    def _thread(self, name: str, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, name=f"channel-{name}", daemon=True)
        self._threads.all.append(thread)
        thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """After the end: join the threads, for at most `timeout` seconds."""
        with contextlib.suppress(OSError):
            self._pair.shutdown(socket.SHUT_RDWR)
        for thread in self._threads.all:
            thread.join(timeout)
        if not any(thread.is_alive() for thread in self._threads.all):
            self._splicers.close()
            self._pair.close()

    @property
    def stats(self) -> ReadStats:
        """Sum over all threads."""
        total = ReadStats()
        for stats in list(self._threads.stats):
            total.reads += stats.reads
            total.bytes_store += stats.bytes_store
            total.bytes_fetched += stats.bytes_fetched
            total.errors += stats.errors
        return total

    @property
    def waiting(self) -> int:
        """READs that wait for the loader."""
        return len(self._waiting)

    def _stats(self) -> ReadStats:
        stats: ReadStats | None = getattr(self._stats_local, "stats", None)
        if stats is None:
            stats = self._stats_local.stats = ReadStats()
            self._threads.stats.append(stats)
        return stats

    def invalidate_entry(self, parent: int, name: bytes) -> None:
        """Make the kernel look `name` up again. Blocks until the kernel has the directory's lock: never call it
        while a request of that directory waits for the caller."""
        try:
            os.write(self._device, protocol.inval_entry(parent, name))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENODEV):
                _log.debug("notify: %s", error)

    @property
    def can_expire(self) -> bool:
        """Whether the kernel can do what `expire_entries` asks for."""
        return protocol.can_expire(self._init_request)

    def expire_entries(self, names: Sequence[tuple[int, bytes]], deadline: float) -> int:
        """Have the kernel look these names up again at their next use. Blocks while a directory is locked by a
        request; stops at `deadline`, a time.monotonic(). Returns how many it did not come to."""
        for done, (parent, name) in enumerate(names):
            if time.monotonic() > deadline:
                return len(names) - done
            with contextlib.suppress(OSError):  # ENOENT: the kernel does not know it (any more)
                os.write(self._device, protocol.inval_entry(parent, name, expire=True))
        return 0

    # -- kernel -> pyfuse3

    def _receive_loop(self, descriptor: int) -> None:
        buffer = bytearray(_REQUEST_BYTES)
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
                self._end()
                return
            fields = header.unpack_from(buffer)
            _, opcode, unique, nodeid, _, _, pid, *_ = fields
            if (tracer := self.tracer) is not None:
                tracer.begin(fields, view[:length])
            if opcode == protocol.READ:
                try:
                    self._read(descriptor, unique, nodeid, pid, *read_in.unpack_from(buffer, 40)[1:])
                except Exception:
                    _log.exception("a READ failed in an unforeseen way")
                    self._fail(descriptor, unique, errno.EIO)
                continue
            if opcode == protocol.RELEASE:
                self._files.release(nodeid)
                self._write(descriptor, protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size, 0, unique))
                self._answered(unique, 0)
                continue
            if opcode == protocol.IOCTL:  # Python's open() asks of every file whether it is a terminal
                self._write(descriptor, protocol.error_reply(unique, errno.ENOTTY))
                self._answered(unique, errno.ENOTTY)
                continue
            if opcode == protocol.INTERRUPT:
                self._interrupt(descriptor, unique, protocol.INTERRUPT_IN.unpack_from(buffer, 40)[0])
                continue
            if opcode == protocol.OPEN and is_passthrough(nodeid):
                try:
                    if self._open(descriptor, unique, nodeid, protocol.OPEN_IN.unpack_from(buffer, 40)[0]):
                        continue
                except Exception:
                    _log.exception("an OPEN failed in an unforeseen way")
                    self._fail(descriptor, unique, errno.EIO)
                    continue
            if opcode == protocol.INIT:
                self._init_request = bytes(view[:length])
            if opcode not in protocol.UNANSWERED:
                self._pending[unique] = (descriptor, opcode, nodeid)
            try:
                self._pair.send(view[:length])
            except OSError:
                self._end()
                return

    def _answered(self, unique: int, status: int, reply: bytes | bytearray = b"") -> None:
        if (tracer := self.tracer) is not None:
            tracer.end(unique, status, reply)

    def _end(self) -> None:
        if not self._ended.is_set():
            self._ended.set()
            self._on_end()

    def _interrupt(self, descriptor: int, unique: int, target: int) -> None:
        found = self._waiting.get(target)
        if found is not None and found[1] is not None:
            if self._loader.cancel(found[1]):
                self._waiting.pop(target, None)
                self._fail(found[0], target, errno.EINTR)
        elif (pending := self._pending.get(target)) is not None:
            self._interrupt_open(target, *pending)
        else:
            # the READ is just being taken up or answered in another thread: ask again
            self._write(descriptor, protocol.error_reply(unique, errno.EAGAIN))

    def _interrupt_open(self, unique: int, descriptor: int, opcode: int, nodeid: int) -> None:
        """Let go of who waits for an open that may take long. What pyfuse3 answers later is for nobody (see `_reply`);
        when it answers just now, the kernel takes the first answer, and the other one fails with ENOENT."""
        if opcode != protocol.OPEN or not self._files.at_gate(nodeid):
            return
        self._given_up.add(unique)
        self._write(descriptor, protocol.error_reply(unique, errno.EINTR))
        if unique not in self._pending:
            self._given_up.discard(unique)

    # -- OPEN

    def _open(self, descriptor: int, unique: int, nodeid: int, flags: int) -> bool:
        """Answer an open with passthrough; False: pyfuse3 has to. While somebody traces, it always does."""
        if self.tracer is not None or flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            return False
        backing = self._files.open_whole(nodeid)
        if not backing:
            return False
        reply = protocol.open_reply(unique, nodeid, backing)
        self._tell(descriptor, protocol.OPEN, nodeid, reply, opened=True)
        self._files.opened(nodeid)
        return True

    def _tell(
        self, descriptor: int, opcode: int, nodeid: int, reply: bytes | bytearray, *, opened: bool
    ) -> None:
        """Give the kernel a reply that is not one to a READ; `opened`: to an open that succeeded."""
        try:
            os.write(descriptor, reply)
        except OSError as error:
            if opened and error.errno == errno.ENOENT:
                self._files.release(nodeid)  # interrupted: the kernel will not send RELEASE
            elif error.errno not in (errno.ENOENT, errno.ENODEV):
                _log.warning("the FUSE device refused a reply to request %d: %s", opcode, error.strerror)

    # -- READ

    def _read(self, descriptor: int, unique: int, nodeid: int, thread: int, offset: int, size: int) -> None:
        try:
            load = self._files.reading(nodeid)
            if load.model is not None:
                load.heard(offset, size, self._processes.of(thread))
            length = min(size, load.version.size - offset)
            if length <= 0:
                self._write(descriptor, protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size, 0, unique))
                self._answered(unique, 0)
                return
            if load.read and load.stored.covered(offset, length) and not self._verify_always:
                self._serve(load, descriptor, unique, offset, length, fetched=False)
            else:
                self._ask(load, descriptor, unique, offset, length, tries=_TRIES)
        except FusecacheError as error:
            self._fail(descriptor, unique, errno_of(error))

    def _ask(
        self, load: ObjectLoad, descriptor: int, unique: int, offset: int, length: int, tries: int
    ) -> None:
        """Ask the loader for the bytes and answer, now or when they are there."""
        if self._verify_always:
            self._verify(load, offset, length)
        self._waiting[unique] = (descriptor, None)

        def settled(waiter: Waiter) -> None:
            self._waiting.pop(unique, None)
            if waiter.error is not None:
                self._fail(descriptor, unique, errno_of(waiter.error))
            elif waiter.pieces:
                data = self._loader.copy_out(load, offset, length, waiter.pieces)
                if data is None:
                    self._fail(descriptor, unique, errno.EIO)
                else:
                    self._send(descriptor, unique, data)
            else:
                self._serve(load, descriptor, unique, offset, length, fetched=True, tries=tries - 1)

        try:
            waiter = self._loader.request(load, offset, length, settled)
        except BaseException:
            self._waiting.pop(unique, None)
            raise
        if waiter is None:
            self._waiting.pop(unique, None)
            self._serve(load, descriptor, unique, offset, length, fetched=False, tries=tries - 1)
        elif unique in self._waiting:
            # settled() may have run in between, and then this entry would stay: put it only over the placeholder
            self._waiting[unique] = (descriptor, waiter)
            if not self._loader.waits(waiter):
                self._waiting.pop(unique, None)

    def _serve(
        self,
        load: ObjectLoad,
        descriptor: int,
        unique: int,
        offset: int,
        length: int,
        *,
        fetched: bool,
        tries: int = _TRIES,
    ) -> None:
        stats = self._stats()
        try:
            self._splicers.get().reply(descriptor, unique, load.stored.fileno(), offset, length)
        except ShortReadError as error:
            _log.warning("%s: the cache did not give its bytes: %s", load.version.key, error.strerror)
            self._again(load, descriptor, unique, offset, length, tries)
            return
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                _log.warning("the FUSE device refused a reply: %s", error)
                self._fail(descriptor, unique, errno.EIO)
            else:
                self._answered(unique, errno.EINTR)
            return
        self._answered(unique, 0)
        stats.reads += 1
        if fetched:
            stats.bytes_fetched += length
        else:
            stats.bytes_store += length

    def _again(
        self, load: ObjectLoad, descriptor: int, unique: int, offset: int, length: int, tries: int
    ) -> None:
        """A block that should be in the store can't be read: have it checked, and fetched anew."""
        if tries <= 0:
            self._fail(descriptor, unique, errno.EIO)
            return
        self._verify(load, offset, length)
        try:
            self._ask(load, descriptor, unique, offset, length, tries)
        except FusecacheError as error:
            self._fail(descriptor, unique, errno_of(error))

    def _verify(self, load: ObjectLoad, offset: int, length: int) -> None:
        size = load.stored.block_size
        for block in range(offset // size, (offset + length - 1) // size + 1):
            if load.stored.present(block):
                self._loader.suspect(load, block)

    def _send(self, descriptor: int, unique: int, data: bytes) -> None:
        header = protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size + len(data), 0, unique)
        with contextlib.suppress(OSError):
            os.writev(descriptor, [header, data])
        self._answered(unique, 0)
        stats = self._stats()
        stats.reads += 1
        stats.bytes_fetched += len(data)

    def _fail(self, descriptor: int, unique: int, number: int) -> None:
        if number != errno.EINTR:
            self._stats().errors += 1
        self._write(descriptor, protocol.error_reply(unique, number))
        self._answered(unique, number)

    def _write(self, descriptor: int, reply: bytes) -> None:
        # ENOENT: the request was interrupted; ENODEV: unmounted
        with contextlib.suppress(OSError):
            os.write(descriptor, reply)

    # -- pyfuse3 -> kernel

    def _reply_loop(self) -> None:
        buffer = bytearray(_PAIR_BYTES)
        view = memoryview(buffer)
        while True:
            try:
                length = self._pair.recv_into(buffer)
            except OSError:
                return
            if length < protocol.OUT_HEADER.size:
                return
            try:
                self._reply(bytearray(view[:length]))
            except Exception:
                _log.exception("a reply failed in an unforeseen way")

    def _reply(self, reply: bytearray) -> None:
        _, status, unique = protocol.OUT_HEADER.unpack_from(reply)
        descriptor, opcode, nodeid = self._pending.pop(unique, (self._device, 0, 0))
        if unique in self._given_up:
            self._given_up.discard(unique)
            if status == 0:
                self._files.release(nodeid)
            return
        if opcode == protocol.INIT:
            asked = self._passthrough and protocol.wants_passthrough(self._init_request)
            protocol.rewrite_init(reply, self._limits, passthrough=asked)
            if descriptor >= 0:
                os.write(descriptor, reply)
                self._on_init(self._init_request, bytes(reply))
            self._ready.set()
            return
        if self.tracer is not None:
            protocol.rewrite_uncached(reply, opcode)
            self._answered(unique, status, reply)
        opened = opcode == protocol.OPEN and status == 0
        if opened:
            if is_passthrough(nodeid):
                protocol.rewrite_open(reply, self._files.backing_id(nodeid))
        elif opcode in (protocol.LOOKUP, protocol.GETATTR, protocol.READDIRPLUS):
            protocol.rewrite_inode_numbers(reply, opcode)
        self._tell(descriptor, opcode, nodeid, reply, opened=opened)
