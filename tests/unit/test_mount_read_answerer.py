"""READs that wait: each is answered exactly once, by the one who has its bytes or by its interrupt."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fusecache.errors import UnavailableError
from fusecache.fetch.read_observer import ReadObserver
from fusecache_mount.device.read_answerer import ReadAnswerer
from fusecache_mount.device.reply_writer import ReplyWriter, ThreadReadStats
from fusecache_mount.device.splice import ThreadSplicers
from fusecache_mount.device.trace_switch import TraceSwitch
from fusecache_mount.kernel import protocol

SIZE = 10_000


class Fetches:
    """A fetch service of one object, nothing of which is there. A test settles the waiters."""

    def __init__(self) -> None:
        stored = SimpleNamespace(block_size=4096, is_range_servable=lambda _offset, _length: False)
        self.object_fetch = SimpleNamespace(
            version=SimpleNamespace(size=SIZE, key="k"), fetch_whole=True, stored=stored
        )
        self.waiters = self
        self.settle: list[Callable[[Any], None]] = []
        self.settles_at_once = False
        self.is_there_to_cancel = True
        self.copied = b"x" * 100

    def get_object_fetch(self, _nodeid: int) -> Any:
        return self.object_fetch

    def request_bytes(
        self, _fetch: Any, _offset: int, _length: int, on_settled: Callable[[Any], None]
    ) -> Any:
        if self.settles_at_once:
            on_settled(SimpleNamespace(error=None, pieces={0: b"x"}))
        else:
            self.settle.append(on_settled)
        return SimpleNamespace()

    def is_waiting(self, _waiter: Any) -> bool:
        return not self.settles_at_once

    def cancel_waiter(self, _waiter: Any) -> bool:
        return self.is_there_to_cancel

    def copy_bytes(self, _fetch: Any, _offset: int, _length: int, _pieces: Any) -> bytes:
        return self.copied


class Bench:
    def __init__(self) -> None:
        self.kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kernel.setblocking(False)
        self.device_fd = device.detach()
        self.fetches = Fetches()
        self.stats = ThreadReadStats()
        self.splicers = ThreadSplicers()
        writer = ReplyWriter(cast(Any, None), TraceSwitch(), self.stats)
        self.reads = ReadAnswerer(
            cast(Any, self.fetches),
            cast(Any, self.fetches),
            writer,
            read_observer=ReadObserver(),
            splicers=self.splicers,
            stats=self.stats,
            verify_always=False,
        )

    def read(self, unique: int, offset: int = 0, size: int = 100) -> None:
        self.reads.answer_read(self.device_fd, unique, 7, os.getpid(), offset, size)

    def answers(self) -> list[tuple[int, int]]:
        """(unique, errno) of the replies since the last call."""
        found = []
        while True:
            try:
                reply = self.kernel.recv(1 << 16)
            except BlockingIOError:
                return found
            _, status, unique = protocol.OUT_HEADER.unpack_from(reply)
            found.append((unique, -status))

    def close(self) -> None:
        self.kernel.close()
        os.close(self.device_fd)
        self.splicers.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def test_a_read_behind_the_end_is_empty(bench: Bench) -> None:
    bench.read(1, offset=SIZE)
    assert bench.answers() == [(1, 0)]
    assert bench.reads.waiting_read_count == 0


def test_a_read_waits_until_its_bytes_are_there(bench: Bench) -> None:
    bench.read(2)
    assert (bench.answers(), bench.reads.waiting_read_count) == ([], 1)
    bench.fetches.settle[0](SimpleNamespace(error=None, pieces={0: b"x"}))
    assert (bench.answers(), bench.reads.waiting_read_count) == ([(2, 0)], 0)
    assert (bench.stats.total().reads, bench.stats.total().bytes_fetched) == (1, 100)


def test_a_read_whose_bytes_can_not_be_had_fails(bench: Bench) -> None:
    bench.read(3)
    bench.fetches.settle[0](SimpleNamespace(error=UnavailableError("down"), pieces={}))
    assert (bench.answers(), bench.reads.waiting_read_count) == ([(3, errno.EIO)], 0)
    assert bench.stats.total().errors == 1


def test_bytes_that_come_before_the_waiter_is_known_leave_nothing_behind(bench: Bench) -> None:
    bench.fetches.settles_at_once = True
    bench.read(4)
    assert (bench.answers(), bench.reads.waiting_read_count) == ([(4, 0)], 0)


def test_an_interrupt_answers_a_read_that_waits(bench: Bench) -> None:
    bench.read(5)
    assert bench.reads.interrupt(5)
    assert (bench.answers(), bench.reads.waiting_read_count) == ([(5, errno.EINTR)], 0)
    assert bench.stats.total().errors == 0  # no failure
    assert not bench.reads.interrupt(5)


def test_an_interrupt_that_comes_too_late_leaves_the_answer_to_the_fetch(bench: Bench) -> None:
    bench.read(6)
    bench.fetches.is_there_to_cancel = False  # its last block is just being told
    assert bench.reads.interrupt(6)
    assert bench.answers() == []
    bench.fetches.settle[0](SimpleNamespace(error=None, pieces={0: b"x"}))
    assert bench.answers() == [(6, 0)]


def test_an_interrupt_of_no_read_is_not_ours(bench: Bench) -> None:
    assert not bench.reads.interrupt(99)
