"""Between the kernel and pyfuse3: requests go to pyfuse3 through a SOCK_SEQPACKET pair that looks like /dev/fuse to
libfuse, and its replies come back and are rewritten (INIT, OPEN, and st_ino wherever it appears).

| A request | By | It is |
|---|---|---|
| read from the device | `forward_request` | pending at pyfuse3, if it is one that gets a reply |
| pending | pyfuse3 replies | answered |
| pending, an OPEN that waits for an attestation | INTERRUPT | abandoned: the kernel has its EINTR |
| abandoned | pyfuse3 replies | dropped; an open that succeeded is released |
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
from collections.abc import Callable

from fusecache.errors import FusecacheError
from fusecache_mount.device.init_exchange import InitExchange
from fusecache_mount.device.open_files import OpenFiles
from fusecache_mount.device.reply_writer import ReplyWriter
from fusecache_mount.device.trace_switch import TraceSwitch
from fusecache_mount.kernel import protocol
from fusecache_mount.kernel.nodeids import is_passthrough
from fusecache_mount.kernel.protocol import Opcode

_log = logging.getLogger(__name__)

_SOCKET_BUFFER_BYTES = 4 << 20
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_TAKEOVER_SECONDS = 30.0
"""Most seconds in which pyfuse3 answers the INIT request of an earlier daemon."""


class Pyfuse3Relay:
    """One connection to pyfuse3. `on_init(request, reply)` gets the INIT exchange, from the reply thread. Thread-safe:
    both tables are used by single operations, without a lock."""

    def __init__(
        self,
        device_fd: int,
        open_files: OpenFiles,
        writer: ReplyWriter,
        *,
        init_exchange: InitExchange,
        trace_switch: TraceSwitch,
        on_init: Callable[[bytes, bytes], None],
    ) -> None:
        self._device_fd = device_fd
        self._open_files = open_files
        self._writer = writer
        self._init_exchange = init_exchange
        self._trace_switch = trace_switch
        self._on_init = on_init
        self._init_answered = threading.Event()
        self._pending: dict[int, tuple[int, int, int]] = {}
        """unique -> descriptor (-1: of an earlier daemon, which answered it), opcode, nodeid of what pyfuse3 has."""
        self._abandoned_opens: set[int] = set()
        """unique of OPENs that were interrupted, and answered, while pyfuse3 still has them."""
        theirs, self._socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (theirs, self._socket):
            for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
                with contextlib.suppress(PermissionError):
                    end.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
        theirs.setblocking(False)
        self._pyfuse3_fd = theirs.detach()

    @property
    def pyfuse3_path(self) -> str:
        """The mountpoint for pyfuse3.init(): libfuse takes over the descriptor behind it."""
        return f"/dev/fd/{self._pyfuse3_fd}"

    # -- kernel -> pyfuse3

    def forward_request(
        self, descriptor: int, opcode: int, unique: int, nodeid: int, request: memoryview
    ) -> None:
        """Give pyfuse3 a request. Raises OSError when pyfuse3 is gone."""
        if opcode == Opcode.INIT:
            self._init_exchange.record_request(bytes(request))
        if opcode not in protocol.OPCODES_WITHOUT_REPLY:
            self._pending[unique] = (descriptor, opcode, nodeid)
        self._socket.send(request)

    def replay_init(self, request: bytes) -> None:
        """Give pyfuse3 the INIT request that an earlier daemon answered, and wait until it took the connection over.
        Raises FusecacheError when it does not in time."""
        self._init_exchange.record_request(request)
        self._pending[protocol.IN_HEADER.unpack_from(request)[2]] = (-1, Opcode.INIT, 0)
        self._socket.send(request)
        if not self._init_answered.wait(_TAKEOVER_SECONDS):
            raise FusecacheError("pyfuse3 did not take over the connection")

    def interrupt(self, unique: int) -> bool:
        """Let the program go whose open may take long. False: pyfuse3 has no request by this number. When pyfuse3
        answers just now, the kernel takes the first answer, and the other one fails with ENOENT."""
        pending = self._pending.get(unique)
        if pending is None:
            return False
        descriptor, opcode, nodeid = pending
        if opcode == Opcode.OPEN and self._open_files.is_awaiting_attestation(nodeid):
            self._abandoned_opens.add(unique)
            self._writer.try_write(descriptor, protocol.error_reply(unique, errno.EINTR))
            if unique not in self._pending:
                self._abandoned_opens.discard(unique)
        return True

    # -- pyfuse3 -> kernel

    def run_reply_loop(self) -> None:
        """Pass replies on until `shut_down`, or until pyfuse3 closes its end."""
        buffer = bytearray(_SOCKET_BUFFER_BYTES)
        view = memoryview(buffer)
        while True:
            try:
                length = self._socket.recv_into(buffer)
            except OSError:
                return
            if length < protocol.OUT_HEADER.size:
                return
            try:
                self._forward_reply(bytearray(view[:length]))
            except Exception:
                _log.exception("a reply failed in an unforeseen way")

    def shut_down(self) -> None:
        """End the reply loop."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close this end; no thread uses it any more."""
        self._socket.close()

    def _forward_reply(self, reply: bytearray) -> None:
        _, status, unique = protocol.OUT_HEADER.unpack_from(reply)
        descriptor, opcode, nodeid = self._pending.pop(unique, (self._device_fd, 0, 0))
        if unique in self._abandoned_opens:
            self._abandoned_opens.discard(unique)
            if status == 0:
                self._open_files.release(nodeid)
            return
        if opcode == Opcode.INIT:
            self._forward_init_reply(descriptor, reply)
            return
        if self._trace_switch.is_on:
            protocol.rewrite_as_uncached(reply, opcode)
            self._writer.report_answer(unique, status, reply)
        is_successful_open = opcode == Opcode.OPEN and status == 0
        if is_successful_open:
            if is_passthrough(nodeid):
                protocol.rewrite_open(reply, self._open_files.backing_id(nodeid))
        elif opcode in (Opcode.LOOKUP, Opcode.GETATTR, Opcode.READDIRPLUS):
            protocol.rewrite_inode_numbers(reply, opcode)
        self._writer.write_reply(descriptor, opcode, nodeid, reply, is_successful_open=is_successful_open)

    def _forward_init_reply(self, descriptor: int, reply: bytearray) -> None:
        self._init_exchange.rewrite_reply(reply)
        if descriptor >= 0:
            os.write(descriptor, reply)
            self._on_init(self._init_exchange.request, bytes(reply))
        self._init_answered.set()
