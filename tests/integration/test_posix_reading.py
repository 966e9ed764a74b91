"""The ways in which engines and loaders read, on a real mount: through the daemon while a file is fetched, through the
daemon when all of it is cached, and through passthrough where the kernel allows it."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.content import content
from tests.support.mounting import RealMount, failing, mounted, needs_fuse

pytestmark = needs_fuse

_SIZE = (9 << 20) + 4321
_TAIL = 4321


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with files that differ in name and content."""
    made = tmp_path_factory.mktemp("origin")
    for number in range(24):
        (made / f"{number:02d}.bin").write_bytes(content(f"{number:02d}.bin", 1, 0, _SIZE))
    return made


@pytest.fixture(scope="module", params=["auto", "off"])
def mount(
    request: pytest.FixtureRequest, origin: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealMount]:
    """The directory, mounted with passthrough where it can be had, and without."""
    work = tmp_path_factory.mktemp(f"reading-{request.param}")
    with mounted(f"file://{origin}", work, passthrough=request.param, prefetch="off") as made:
        yield made


@pytest.fixture(params=["cold", "warm"])
def file(request: pytest.FixtureRequest, mount: RealMount) -> Path:
    """A file that nobody has read yet, and one that is cached and verified."""
    names: list[str] = request.config.stash.setdefault(_STASH, {}).setdefault(mount.path, [])
    if request.param == "warm":
        found = mount.path / "00.bin"
        assert len(found.read_bytes()) == _SIZE
        return found
    names.append(f"{len(names) + 1:02d}.bin")
    return mount.path / names[-1]


_STASH: pytest.StashKey[dict[Path, list[str]]] = pytest.StashKey()


def expected(file: Path, offset: int = 0, length: int = _SIZE) -> bytes:
    return content(file.name, 1, offset, min(length, _SIZE - offset))


def test_private_writable_and_shared_mappings(file: Path) -> None:
    with open(file, "rb") as opened:
        private = mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        shared = mmap.mmap(opened.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
        assert failing(lambda: mmap.mmap(opened.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_WRITE)) == "EACCES"
    for advice in (mmap.MADV_SEQUENTIAL, mmap.MADV_WILLNEED, mmap.MADV_RANDOM):
        shared.madvise(advice)
    assert shared[_SIZE - 5 :] == expected(file, _SIZE - 5)  # backwards first
    assert shared[:] == expected(file)
    private[7:9] = b"??"
    assert private[:9] == expected(file, 0, 7) + b"??"
    assert private[9:] == expected(file, 9)
    assert shared[:] == expected(file)
    private.close()
    shared.close()
    assert file.read_bytes() == expected(file)


def test_the_same_file_opened_many_times(file: Path) -> None:
    opened = [open(file, "rb") for _ in range(8)]  # noqa: SIM115
    try:
        for number, each in enumerate(opened):
            each.seek(number * 1_000_000)
            assert each.read(1_000_000) == expected(file, number * 1_000_000, 1_000_000)
    finally:
        for each in opened:
            each.close()


def test_64_reads_in_flight(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(64) as pool:
            offsets = [(number * 7_919_000) % _SIZE for number in range(128)]
            found = list(pool.map(lambda offset: os.pread(fd, 300_001, offset), offsets))
        assert found == [expected(file, offset, 300_001) for offset in offsets]
    finally:
        os.close(fd)


def test_o_direct_with_an_unaligned_tail(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        page = mmap.mmap(-1, 4 << 20)
        assert os.preadv(fd, [page], 0) == 4 << 20
        assert page[:] == expected(file, 0, 4 << 20)
        tail = _SIZE - _TAIL
        assert os.preadv(fd, [page], tail) == _TAIL
        assert page[:_TAIL] == expected(file, tail)
        assert os.preadv(fd, [page], (_SIZE + 4096) & ~4095) == 0
    finally:
        os.close(fd)


def test_flags_and_ways_of_reading(file: Path, tmp_path: Path) -> None:
    fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        os.posix_fadvise(fd, 1 << 20, 1 << 20, os.POSIX_FADV_WILLNEED)
        parts = [bytearray(100_000), bytearray(5), bytearray(200_000)]
        assert os.preadv(fd, parts, 1) == 300_005
        assert b"".join(parts) == expected(file, 1, 300_005)
        assert os.pread(fd, 10, _SIZE) == os.pread(fd, 10, _SIZE + 10**9) == b""
        assert os.pread(fd, 3 * _SIZE, 0) == expected(file)
        assert os.lseek(fd, 0, os.SEEK_END) == _SIZE
        assert os.lseek(fd, 10, os.SEEK_DATA) == 10
        assert os.lseek(fd, 10, os.SEEK_HOLE) == _SIZE
        assert failing(lambda: os.lseek(fd, _SIZE, os.SEEK_DATA)) == "ENXIO"
        os.lseek(fd, 0, os.SEEK_SET)
        assert select.select([fd], [], [], 0)[0] == [fd]
        fcntl.flock(fd, fcntl.LOCK_EX)
        fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)
    shutil.copyfile(file, tmp_path / "copy")  # sendfile, copy_file_range or splice
    assert (tmp_path / "copy").read_bytes() == expected(file)
    with open(file, "rb") as source, open(tmp_path / "other", "wb") as target:
        # as between any two file systems; programs then copy by themselves
        assert failing(lambda: os.copy_file_range(source.fileno(), target.fileno(), 10)) == "EXDEV"


def test_a_mapping_keeps_its_bytes_after_everything_else_is_closed(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    mapping = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
    os.close(fd)
    with ThreadPoolExecutor(16) as pool:  # parallel faults
        pieces = list(pool.map(lambda at: mapping[at : at + 262_144], range(0, _SIZE, 262_144)))
    assert b"".join(pieces) == expected(file)
    mapping.close()


def test_a_child_inherits_an_open_file(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    try:
        script = f"import os, sys; sys.stdout.buffer.write(os.pread({fd}, 5, 1000))"
        done = subprocess.run([sys.executable, "-c", script], pass_fds=[fd], capture_output=True, check=True)
        assert done.stdout == expected(file, 1000, 5)
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        assert os.pread(again, 9, 77) == expected(file, 77, 9)
        os.close(again)
    finally:
        os.close(fd)


def test_statx_says_how_o_direct_is_to_be_aligned_or_nothing(file: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "statx"):
        pytest.skip("this C library has no statx")
    buffer = (ctypes.c_uint8 * 256)()
    at_fdcwd, dioalign = -100, 0x2000
    assert libc.statx(at_fdcwd, os.fsencode(file), 0, 0x7FF | dioalign, buffer) == 0
    mask = int.from_bytes(bytes(buffer[0:4]), sys.byteorder)
    size = int.from_bytes(bytes(buffer[40:48]), sys.byteorder)
    assert size == _SIZE
    if mask & dioalign:
        memory = int.from_bytes(bytes(buffer[152:156]), sys.byteorder)
        offset = int.from_bytes(bytes(buffer[156:160]), sys.byteorder)
        assert memory <= 4096
        assert 0 < offset <= 4096


def test_an_interrupted_or_abandoned_reader_leaves_nothing_behind(mount: RealMount) -> None:
    reader = subprocess.Popen(["cat", *sorted(mount.path.iterdir())], stdout=subprocess.PIPE)
    assert reader.stdout is not None
    reader.stdout.read(1 << 20)
    reader.kill()
    reader.stdout.close()
    reader.wait(30)
    assert (mount.path / "23.bin").read_bytes() == content("23.bin", 1, 0, _SIZE)


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
@pytest.mark.parametrize("engine", ["io_uring", "libaio", "mmap", "psync"])
@pytest.mark.parametrize("direct", [0, 1])
def test_fio_verifies_what_it_wrote_at_the_origin(engine: str, direct: int, tmp_path: Path) -> None:
    if engine == "mmap" and direct:
        pytest.skip("a mapping has no O_DIRECT")
    origin = tmp_path / "origin"
    origin.mkdir()
    job = ["--name=job", "--size=8MiB", "--bs=64KiB", "--verify=crc32c", "--allrandrepeat=1", "--minimal"]

    def fio(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["fio", *job, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )

    wrote = fio(f"--filename={origin / 'data'}", "--rw=write", "--ioengine=psync", "--do_verify=0")
    assert wrote.returncode == 0, wrote.stderr
    with mounted(f"file://{origin}", tmp_path) as mount:
        for _ in range(2):  # cold, then warm
            read = fio(
                f"--filename={mount.path / 'data'}",
                "--rw=read",
                "--verify_only",
                "--readonly",
                f"--ioengine={engine}",
                f"--direct={direct}",
                "--iodepth=32",
            )
            if "engine" in read.stderr and "not" in read.stderr:
                pytest.skip(f"this fio or kernel has no {engine}")
            assert read.returncode == 0, read.stdout + read.stderr
