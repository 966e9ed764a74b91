"""kill -9 of the daemon, at the worst moments: readers go on, every byte is right, nothing whole is fetched twice."""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest

from fusecache_mount.lifecycle import fuse_mount
from tests.support.content import check, content
from tests.support.faulty import FaultyServer
from tests.support.kept import ended
from tests.support.live import (
    HANG,
    MIB,
    Gate,
    asked,
    background,
    covers,
    dropped,
    is_right,
    keeper_pid,
    kill,
    kill_daemon,
    read_file,
    spans,
    starts_at,
    status,
    wait_cached,
)
from tests.support.mounting import RealMount, mounted, needs_fuse, s3_environment
from tests.support.servers import S3Bucket, wait_until

pytestmark = needs_fuse

_SIZE = 16 * MIB + 4321
_BLOCKS = 17
Mounting = Callable[..., RealMount]


@pytest.fixture
def mounting_it(s3_bucket: S3Bucket, faulty_s3: FaultyServer, tmp_path: Path) -> Iterator[Mounting]:
    """Mounts the bucket through the proxy; one request of 8 MiB at a time, so that its order is known."""
    for key in ("shard.bin", "other.bin"):
        s3_bucket.put(key, _content(key))
    env = s3_environment(s3_bucket.server, faulty_s3.url)
    with ExitStack() as stack:

        def mount(**options: object) -> RealMount:
            given = {
                "concurrency": 1,
                "range_size": "8MiB",
                "open_wait": 0,
                "stall_timeout": 3,
                "prefetch_budget": 0,
            } | options
            made: AbstractContextManager[RealMount] = mounted(s3_bucket.url, tmp_path, env=env, **given)
            return stack.enter_context(made)

        yield mount


def _content(key: str) -> bytes:
    return content(key, 1, 0, _SIZE)


@pytest.fixture
def opened() -> Iterator[Callable[[Path], int]]:
    """Opens files, and closes them before the mount goes."""
    with ExitStack() as stack:

        def open_it(path: Path) -> int:
            fd = os.open(path, os.O_RDONLY)
            stack.callback(os.close, fd)
            return fd

        yield open_it


def right(fd: int, key: str, offset: int, length: int) -> None:
    """These bytes of the file, not out of the page cache, are right."""
    data = background(functools.partial(os.pread, dropped(fd), length, offset)).result(HANG)
    assert len(data) == min(length, _SIZE - offset)
    check(data, key, 1, offset)


@pytest.mark.parametrize("passthrough", ["auto", "off"])
def test_in_the_middle_of_a_fill_under_a_reader(
    mounting_it: Mounting, faulty_s3: FaultyServer, opened: Callable[[Path], int], passthrough: str
) -> None:
    mount = mounting_it(passthrough=passthrough)
    path = mount.path / "shard.bin"
    whole = 8 * MIB + 3 * MIB
    # the second request stops in the middle of its fourth block, and what follows is held back
    faulty_s3.add("stall", after=3 * MIB + 500_000, match=starts_at("shard.bin", 8 * MIB))
    fd = opened(path)
    right(fd, "shard.bin", 0, 1000)
    wait_cached(path, whole)
    reader = background(functools.partial(os.pread, fd, 2 * MIB, 12 * MIB))
    wait_until(lambda: _waiting(mount), "a read that waits", HANG)
    faulty_s3.reset_counts()

    first = kill_daemon(mount)

    data = reader.result(HANG)
    assert len(data) == 2 * MIB
    check(data, "shard.bin", 1, 12 * MIB)
    is_right(path, "shard.bin", _SIZE)
    right(fd, "shard.bin", 0, _SIZE)
    fetched = spans(faulty_s3.seen, "shard.bin")
    assert min(start for start, _ in fetched) >= whole, fetched
    assert sum(stop - start for start, stop in fetched) == _SIZE - whole, fetched
    after = status(mount)
    assert after["process"]["pid"] != first
    assert after["process"]["restarts"] == 1
    assert after["cache"]["corrupt_blocks"] == 0


def test_with_many_requests_in_flight(
    mounting_it: Mounting, faulty_s3: FaultyServer, opened: Callable[[Path], int]
) -> None:
    """Blocks land in any order; what had landed is not fetched again, and no more than once what had not."""
    mount = mounting_it(concurrency=8, range_size="2MiB")
    path = mount.path / "shard.bin"
    faulty_s3.add("stall", match=covers("shard.bin", 5 * MIB))
    held = Gate(faulty_s3, covers("shard.bin", 10 * MIB))
    fd = opened(path)
    readers = [background(functools.partial(os.pread, fd, MIB, at * MIB)) for at in (0, 5, 10, 15)]
    held.wait()
    wait_until(lambda: len(_blocks(faulty_s3)) == _BLOCKS, "a request for every block", HANG)
    missing = {
        block
        for request in faulty_s3.seen
        if covers("shard.bin", 5 * MIB)(request) or covers("shard.bin", 10 * MIB)(request)
        for block in _blocks_of(spans([request], "shard.bin"))
    }
    wait_cached(path, _SIZE - len(missing) * MIB)
    faulty_s3.reset_counts()
    kill_daemon(mount)
    held.open()
    for reader, at in zip(readers, (0, 5, 10, 15), strict=True):
        check(reader.result(HANG), "shard.bin", 1, at * MIB)
    is_right(path, "shard.bin", _SIZE)
    assert sorted(_blocks(faulty_s3)) == sorted(missing)


def _blocks(proxy: FaultyServer) -> list[int]:
    """The blocks that were asked for, as often as they were."""
    return _blocks_of(spans(proxy.seen, "shard.bin"))


def _blocks_of(asked: Iterable[tuple[int, int]]) -> list[int]:
    return [block for start, stop in asked for block in range(start // MIB, -(-stop // MIB))]


def test_open_handles_of_every_kind_go_on(
    mounting_it: Mounting, faulty_s3: FaultyServer, opened: Callable[[Path], int]
) -> None:
    mount = mounting_it()
    shard, other = mount.path / "shard.bin", mount.path / "other.bin"
    daemon = opened(shard)  # before it is complete: read through the daemon for as long as it is open
    right(daemon, "shard.bin", 0, _SIZE)
    wait_cached(shard, _SIZE)
    direct = opened(shard)
    mapping = mmap.mmap(direct, 0, mmap.MAP_SHARED, mmap.PROT_READ)
    before = status(mount)
    if before["mode"]["now"] == "passthrough":
        assert before["opens"] == {"passthrough": 1, "daemon": 1}
    number = os.fstat(direct).st_ino
    faulty_s3.reset_counts()

    kill_daemon(mount)

    right(direct, "shard.bin", 5 * MIB, 3 * MIB)
    check(mapping[9 * MIB : 10 * MIB], "shard.bin", 1, 9 * MIB)
    right(daemon, "shard.bin", 2 * MIB + 1, 7 * MIB)
    again = opened(shard)  # the kernel has its backing since before
    right(again, "shard.bin", 0, _SIZE)
    right(opened(other), "other.bin", 0, _SIZE)
    wait_cached(other, _SIZE)
    right(opened(other), "other.bin", 7, MIB)
    assert os.fstat(daemon).st_ino == os.fstat(again).st_ino == number
    after = status(mount)
    assert after["mode"] == before["mode"]
    if after["mode"]["now"] == "passthrough":
        assert after["opens"]["passthrough"] == 2
    assert spans(faulty_s3.seen, "shard.bin") == []
    right(daemon, "shard.bin", 0, _SIZE)
    right(direct, "shard.bin", 0, _SIZE)
    mapping.close()


def test_handles_that_were_closed_while_no_daemon_was_there_are_forgotten(
    mounting_it: Mounting, tmp_path: Path
) -> None:
    mount = mounting_it()
    path = mount.path / "shard.bin"
    read_file(path)
    wait_cached(path, _SIZE)
    fds = [os.open(path, os.O_RDONLY) for _ in range(3)]
    kill_daemon(mount)
    for fd in fds:
        os.close(fd)
    is_right(path, "shard.bin", _SIZE)
    wait_until(lambda: _evicted(mount, path), "an eviction of what nobody has open", HANG)
    is_right(path, "shard.bin", _SIZE)


def _waiting(mount: RealMount) -> bool:
    return bool(asked(mount, "status")["loader"]["waiting_reads"])


def _evicted(mount: RealMount, path: Path) -> bool:
    return mount.command("evict", str(path), check=False).returncode == 0


def test_five_times_in_a_row(
    mounting_it: Mounting, faulty_s3: FaultyServer, opened: Callable[[Path], int]
) -> None:
    mount = mounting_it(range_size="1MiB", prefetch="off")
    path = mount.path / "shard.bin"
    fd = opened(path)
    for number in range(1, 6):
        at = 3 * number * MIB
        held = Gate(faulty_s3, starts_at("shard.bin", at))
        reader = background(functools.partial(os.pread, fd, MIB, at))
        held.wait()
        kill_daemon(mount)
        held.open()
        check(reader.result(HANG), "shard.bin", 1, at)
    is_right(path, "shard.bin", _SIZE)
    assert status(mount)["process"]["restarts"] == 5


def test_daemon_and_keeper_both(mounting_it: Mounting, faulty_s3: FaultyServer) -> None:
    """Nobody is left to serve: readers get an error, and `fusecache umount` takes the mount away."""
    mount = mounting_it()
    path = mount.path / "shard.bin"
    faulty_s3.add("stall", after=MIB, match=covers("shard.bin", 2 * MIB))
    fd = os.open(path, os.O_RDONLY)
    reader = background(functools.partial(os.pread, fd, MIB, 2 * MIB))
    wait_until(lambda: _waiting(mount), "a read that waits", HANG)
    daemon, keeper = int(status(mount)["process"]["pid"]), keeper_pid(mount)
    kill(keeper)
    assert ended(daemon)  # it does not outlive its keeper
    with pytest.raises(OSError, match=r"not connected|abort"):
        reader.result(HANG)
    faulty_s3.clear()
    with contextlib.suppress(OSError):  # FLUSH finds nobody; the descriptor is closed all the same
        os.close(fd)
    done = mount.command("umount", str(mount.path))
    assert done.stderr == ""
    assert fuse_mount.device_number_of(mount.path) is None
    mount = mounting_it()
    is_right(path, "shard.bin", _SIZE)
