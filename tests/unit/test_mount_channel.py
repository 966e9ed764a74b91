"""Requests besides READs that the channel answers itself: it is given a socket pair for a device."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

from fusecache.fetch.read_observer import ReadObserver
from fusecache_mount.device.channel import build_channel
from fusecache_mount.device.trace_switch import TraceSwitch
from fusecache_mount.kernel import protocol
from fusecache_mount.kernel.nodeids import passthrough_nodeid
from fusecache_mount.kernel.protocol import Opcode

PASSTHROUGH = passthrough_nodeid(4711)


class Files:
    """Open files that have `backing` ready for the passthrough nodeid, 0: not."""

    def __init__(self) -> None:
        self.backing = 7
        self.is_awaiting = False
        self.calls: list[str] = []
        self.released = threading.Event()

    def open_passthrough(self, nodeid: int) -> int:
        assert nodeid == PASSTHROUGH
        self.calls.append("open_whole")
        return self.backing

    def open_answered(self, nodeid: int) -> None:
        self.calls.append("opened")

    def is_awaiting_attestation(self, nodeid: int) -> bool:
        return self.is_awaiting

    def release(self, nodeid: int) -> None:
        self.calls.append("release")
        self.released.set()


class Bench:
    def __init__(self) -> None:
        self.kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.files = Files()
        self.trace_switch = TraceSwitch()
        self.device_fd = device.detach()
        self.channel = build_channel(
            self.device_fd,
            [],
            cast(Any, None),
            cast(Any, self.files),
            limits=protocol.InitLimits(12),
            requests_passthrough=True,
            trace_switch=self.trace_switch,
            read_observer=ReadObserver(),
            on_init=lambda _request, _reply: None,
            on_end=lambda: None,
        )
        self.theirs = int(self.channel.pyfuse3_path.rpartition("/")[2])
        self.channel.start(1)

    def send(self, opcode: int, unique: int, nodeid: int, body: bytes) -> None:
        header = protocol.IN_HEADER.pack(40 + len(body), opcode, unique, nodeid, 0, 0, 1, 0, 0)
        self.kernel.send(header + body)

    def send_open(self, unique: int, nodeid: int, flags: int) -> None:
        self.send(Opcode.OPEN, unique, nodeid, protocol.OPEN_IN.pack(flags, 0))

    def answered(self) -> bytes:
        """The reply that the kernel got."""
        assert select.select([self.kernel], [], [], 20)[0]
        return self.kernel.recv(4096)

    def passed_on(self) -> int:
        """The `unique` of the request that pyfuse3 got."""
        assert select.select([self.theirs], [], [], 20)[0]
        return int(protocol.IN_HEADER.unpack_from(os.read(self.theirs, 4096))[2])

    def reply(self, unique: int, body: bytes) -> None:
        """Have pyfuse3 reply to a request that it got, with success."""
        os.write(
            self.theirs, protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size + len(body), 0, unique) + body
        )

    def close(self) -> None:
        self.kernel.close()
        self.channel.close()
        os.close(self.theirs)
        os.close(self.device_fd)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def test_an_open_of_a_whole_file_does_not_pass_through_pyfuse3(bench: Bench) -> None:
    bench.send_open(21, PASSTHROUGH, os.O_RDONLY)
    reply = bench.answered()
    assert protocol.OUT_HEADER.unpack_from(reply) == (32, 0, 21)
    assert struct.unpack_from("<QIi", reply, 16) == (PASSTHROUGH, protocol.FOPEN_PASSTHROUGH, 7)
    bench.files.backing = 0
    bench.send_open(22, PASSTHROUGH, os.O_RDONLY)
    assert bench.passed_on() == 22  # and not 21
    assert bench.files.calls == ["open_whole", "opened", "open_whole"]


@pytest.mark.parametrize(
    ("nodeid", "flags"),
    [(4711, os.O_RDONLY), (PASSTHROUGH, os.O_RDWR), (PASSTHROUGH, os.O_WRONLY), (PASSTHROUGH, os.O_TRUNC)],
)
def test_all_other_opens_are_pyfuse3s(bench: Bench, nodeid: int, flags: int) -> None:
    bench.send_open(23, nodeid, flags)
    assert bench.passed_on() == 23
    assert bench.files.calls == []


def test_while_somebody_traces_opens_are_pyfuse3s(bench: Bench) -> None:
    class Observer:
        def request_received(self, header: tuple[int, ...], request: memoryview) -> None:
            pass

        def request_answered(self, unique: int, status: int, reply: bytes | bytearray = b"") -> None:
            pass

    bench.trace_switch.turn_on(Observer())
    bench.send_open(24, PASSTHROUGH, os.O_RDONLY)
    assert bench.passed_on() == 24
    assert bench.files.calls == []


def test_whether_a_file_is_a_terminal_is_not_asked_of_pyfuse3(bench: Bench) -> None:
    """Each open() of Python asks; the kernel remembers nothing of the answer."""
    tcgets = 0x5401
    bench.send(Opcode.IOCTL, 25, PASSTHROUGH, struct.pack("<QIIQII", PASSTHROUGH, 0, tcgets, 0, 0, 0))
    assert protocol.OUT_HEADER.unpack(bench.answered()) == (16, -errno.ENOTTY, 25)
    bench.send_open(26, 4711, os.O_RDONLY)
    assert bench.passed_on() == 26  # and not 25


def test_an_open_that_waits_for_an_attestation_can_be_interrupted(bench: Bench) -> None:
    """The kernel does not let a program go whose OPEN was read: it has to be answered."""
    bench.files.is_awaiting = True
    bench.send_open(31, 4711, os.O_RDONLY)
    assert bench.passed_on() == 31
    bench.send(Opcode.INTERRUPT, 32, 0, protocol.INTERRUPT_IN.pack(31))
    assert protocol.OUT_HEADER.unpack(bench.answered()) == (16, -errno.EINTR, 31)
    bench.reply(31, struct.pack("<QIi", 4711, 0, 0))  # it succeeded, for nobody
    assert bench.files.released.wait(20)
    bench.send_open(33, 4711, os.O_RDONLY)
    assert bench.passed_on() == 33
    bench.reply(33, struct.pack("<QIi", 4711, 0, 0))
    assert protocol.OUT_HEADER.unpack_from(bench.answered()) == (32, 0, 33)  # and none to 31 before
    assert bench.files.calls == ["release"]


def test_other_opens_are_not_interrupted(bench: Bench) -> None:
    bench.send_open(34, 4711, os.O_RDONLY)
    assert bench.passed_on() == 34
    bench.send(Opcode.INTERRUPT, 35, 0, protocol.INTERRUPT_IN.pack(34))
    bench.reply(34, struct.pack("<QIi", 4711, 0, 0))
    assert protocol.OUT_HEADER.unpack_from(bench.answered()) == (32, 0, 34)
    assert bench.files.calls == []


def test_an_interrupt_of_a_request_in_another_thread_is_asked_for_again(bench: Bench) -> None:
    bench.send(Opcode.INTERRUPT, 36, 0, protocol.INTERRUPT_IN.pack(99))
    assert protocol.OUT_HEADER.unpack(bench.answered()) == (16, -errno.EAGAIN, 36)


def test_a_release_is_answered_at_once(bench: Bench) -> None:
    bench.send(Opcode.RELEASE, 37, 4711, bytes(24))
    assert protocol.OUT_HEADER.unpack(bench.answered()) == (16, 0, 37)
    assert bench.files.calls == ["release"]


def test_a_trace_hears_of_requests_and_of_answers(bench: Bench) -> None:
    class Observer:
        def __init__(self) -> None:
            self.heard: list[tuple[str, int]] = []
            self.has_answer = threading.Event()

        def request_received(self, header: tuple[int, ...], request: memoryview) -> None:
            self.heard.append(("received", header[2]))

        def request_answered(self, unique: int, status: int, reply: bytes | bytearray = b"") -> None:
            self.heard.append(("answered", unique))
            self.has_answer.set()

    observer = Observer()
    bench.trace_switch.turn_on(observer)
    bench.send(Opcode.RELEASE, 38, 4711, bytes(24))
    bench.answered()
    assert observer.has_answer.wait(20)
    bench.trace_switch.turn_off()
    bench.send(Opcode.RELEASE, 39, 4711, bytes(24))
    bench.answered()
    assert observer.heard == [("received", 38), ("answered", 38)]
