"""Replies spliced from a file; a pipe stands in for the FUSE device."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusecache_mount.device.splice import ShortReadError, Splicer, ThreadSplicers
from fusecache_mount.kernel.protocol import OUT_HEADER
from tests.support.content import check, content

SIZE = (3 << 20) + 17


@pytest.fixture
def source(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "data"
    path.write_bytes(content("d", 1, 0, SIZE))
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def device() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 1 << 20)
    yield read, write
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1), (5, 4096), (4095, 130_000), (0, 900 << 10), (SIZE - 3, 3)]
)
def test_a_reply_is_a_header_and_the_bytes(
    source: int, device: tuple[int, int], offset: int, length: int
) -> None:
    splicer = Splicer()
    for unique in (7, 9):
        splicer.send_reply(device[1], unique, source, offset, length)
        assert OUT_HEADER.unpack(os.read(device[0], 16)) == (16 + length, 0, unique)
        data = b""
        while len(data) < length:
            data += os.read(device[0], length - len(data))
        check(data, "d", 1, offset)
    splicer.close()


def test_a_reply_that_is_too_large_for_the_pipe_is_copied(source: int, device: tuple[int, int]) -> None:
    splicer = Splicer()
    length = splicer.max_reply_pages * 4096 + 1
    got = bytearray()

    def drain() -> None:
        while len(got) < 16 + length:
            got.extend(os.read(device[0], 1 << 20))

    reader = threading.Thread(target=drain)
    reader.start()
    splicer.send_reply(device[1], 7, source, 3, length)
    reader.join(20)
    check(got[16:], "d", 1, 3)
    splicer.close()


def test_a_file_that_is_too_short_answers_nothing(source: int, device: tuple[int, int]) -> None:
    splicer = Splicer()
    with pytest.raises(ShortReadError):
        splicer.send_reply(device[1], 7, source, SIZE - 10, 20)
    splicer.send_reply(device[1], 8, source, 0, 4)
    assert OUT_HEADER.unpack(os.read(device[0], 16))[2] == 8
    splicer.close()


def test_each_thread_has_its_own() -> None:
    splicers = ThreadSplicers()
    mine = splicers.get_splicer()
    others: list[Splicer] = []
    thread = threading.Thread(target=lambda: others.append(splicers.get_splicer()))
    thread.start()
    thread.join()
    assert splicers.get_splicer() is mine
    assert others[0] is not mine
    splicers.close()
