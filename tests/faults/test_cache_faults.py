"""A cache that is broken, full, too small, shared or not there: right bytes, or one line that says why not."""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.content import check, content
from tests.support.faulty import FaultyServer
from tests.support.live import (
    HANG,
    MIB,
    background,
    cached,
    dropped,
    in_time,
    is_right,
    read_file,
    spans,
    status,
    wait_cached,
)
from tests.support.mounting import RealMount, command, mounted, needs_fuse, s3_environment, tmpfs
from tests.support.servers import S3Bucket, wait_until

pytestmark = needs_fuse
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")

_SIZE = 5 * MIB + 123
_BIG = 64 * MIB


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A directory with two files."""
    made = tmp_path / "origin"
    made.mkdir()
    for name in ("one.bin", "two.bin"):
        (made / name).write_bytes(content(name, 1, 0, _SIZE))
    return made


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes file systems of so many MiB."""
    with ExitStack() as stack:
        yield lambda size: stack.enter_context(tmpfs(tmp_path / f"disk-{size}", size))


def data_file(cache: Path, size: int = _SIZE) -> Path:
    """The one file in the cache that has the size of an object."""
    (found,) = (path for path in cache.rglob("*") if path.is_file() and path.stat().st_size == size)
    return found


def flip(path: Path, *offsets: int) -> None:
    """Flip a bit of these bytes."""
    with open(path, "r+b") as file:
        for offset in offsets:
            file.seek(offset)
            wrong = file.read(1)[0] ^ 0x10
            file.seek(offset)
            file.write(bytes([wrong]))


# -- flipped bits


@pytest.mark.parametrize("passthrough", ["auto", "off"])
@pytest.mark.expected_log("is damaged and is fetched again")
def test_bits_that_flipped_between_two_mounts(origin: Path, tmp_path: Path, passthrough: str) -> None:
    source = f"file://{origin}"
    with mounted(source, tmp_path, passthrough=passthrough, prefetch_budget=0) as mount:
        is_right(mount.path / "one.bin", "one.bin", _SIZE)
        wait_cached(mount.path / "one.bin", _SIZE)
    flip(data_file(tmp_path / "cache"), 0, 3 * MIB + 17, _SIZE - 1)
    with mounted(source, tmp_path, passthrough=passthrough, prefetch_budget=0) as mount:
        for _ in range(2):
            is_right(mount.path / "one.bin", "one.bin", _SIZE)
        found = status(mount)
        assert found["cache"]["corrupt_blocks"] == 3
        assert found["bytes"]["origin"] == 2 * MIB + _SIZE % MIB


@pytest.mark.expected_log("is damaged and is fetched again")
def test_bits_that_flip_while_every_read_is_verified(origin: Path, tmp_path: Path) -> None:
    with mounted(f"file://{origin}", tmp_path, verify="always", prefetch_budget=0) as mount:
        path = mount.path / "one.bin"
        with open(path, "rb", buffering=0) as file:
            check(file.read(), "one.bin", 1)
            wait_cached(path, _SIZE)
            flip(data_file(tmp_path / "cache"), 2 * MIB, 4 * MIB + 5)
            data = in_time(functools.partial(os.pread, dropped(file.fileno()), _SIZE, 0))
            check(data, "one.bin", 1)
        assert status(mount)["cache"]["corrupt_blocks"] >= 2  # once more where two READs met the same block


def test_a_cache_that_was_cut_short_or_emptied_between_two_mounts(origin: Path, tmp_path: Path) -> None:
    source = f"file://{origin}"
    with mounted(source, tmp_path) as mount:
        for name in ("one.bin", "two.bin"):
            is_right(mount.path / name, name, _SIZE)
            wait_cached(mount.path / name, _SIZE)
    one, two = (
        path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size == _SIZE
    )
    os.truncate(one, 2 * MIB)
    two.unlink()
    with mounted(source, tmp_path) as mount:
        for name in ("one.bin", "two.bin"):
            is_right(mount.path / name, name, _SIZE)


# -- no space


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A directory with one file of 64 MiB."""
    made = tmp_path / "big"
    made.mkdir()
    (made / "model.safetensors").write_bytes(content("model.safetensors", 1, 0, _BIG))
    return made


def reads_right(path: Path) -> None:
    """Twice, by read and by a mapping."""
    is_right(path, path.name, _BIG)
    with open(path, "rb") as file:
        dropped(file.fileno())
        mapping = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
    for start in range(0, _BIG, 4 * MIB):
        piece = in_time(functools.partial(mapping.__getitem__, slice(start, start + 4 * MIB)))
        check(piece, path.name, 1, start)
    mapping.close()


def test_a_cache_disk_that_is_smaller_than_the_file(
    big: Path, disk: Callable[[int], Path], tmp_path: Path
) -> None:
    cache = disk(16) / "cache"
    with mounted(f"file://{big}", tmp_path, cache_dir=cache, free_space=0) as mount:
        reads_right(mount.path / "model.safetensors")
        found = status(mount)
        assert found["reads"]["failed"] == 0
        assert found["cache"]["used"] <= 16 * MIB


@pytest.mark.expected_log("database or disk is full")
def test_a_cache_disk_that_somebody_else_fills(
    big: Path, disk: Callable[[int], Path], tmp_path: Path
) -> None:
    full = disk(48)
    with mounted(f"file://{big}", tmp_path, cache_dir=full / "cache", free_space=0, prefetch="off") as mount:
        path = mount.path / "model.safetensors"
        with open(path, "rb", buffering=0) as file:
            check(file.read(MIB), path.name, 1)
        with contextlib.suppress(OSError), open(full / "hog", "wb", buffering=0) as hog:
            while hog.write(bytes(MIB)) == MIB:
                pass
        reads_right(path)
        assert status(mount)["reads"]["failed"] == 0
        (full / "hog").unlink()
        is_right(path, path.name, _BIG)


def test_a_cache_size_that_is_smaller_than_a_file(big: Path, tmp_path: Path) -> None:
    with mounted(f"file://{big}", tmp_path, cache_size="20MiB") as mount:
        reads_right(mount.path / "model.safetensors")
        found = status(mount)
        assert found["cache"]["used"] <= found["cache"]["limit"] == 20 * MIB
        assert found["reads"]["failed"] == 0


# -- no cache directory


def refused(origin: Path, work: Path, cache: Path) -> str:
    """The one line that `fusecache mount` says."""
    (work / "mnt").mkdir(exist_ok=True)
    options = f"cache_dir={cache},runtime_dir={work}/run"
    done = command("mount", f"file://{origin}", str(work / "mnt"), "-o", options, check=False)
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("fusecache: ")
    assert str(cache) in done.stderr
    assert not os.path.ismount(work / "mnt")
    return done.stderr


def test_a_cache_directory_that_is_a_file(origin: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    assert "directory" in refused(origin, tmp_path, tmp_path / "file")
    refused(origin, tmp_path, tmp_path / "file" / "below")
    assert (tmp_path / "file").read_bytes() == b"precious"


@pytest.mark.expected_log("its parent .* does not exist")
def test_a_cache_directory_whose_disk_is_not_mounted(origin: Path, tmp_path: Path) -> None:
    """One missing level is made; more of them are a disk that is not there."""
    assert "does not exist" in refused(origin, tmp_path, tmp_path / "not" / "there" / "yet")
    assert not (tmp_path / "not").exists()
    with mounted(f"file://{origin}", tmp_path, cache_dir=tmp_path / "new") as mount:
        is_right(mount.path / "one.bin", "one.bin", _SIZE)
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0


def test_a_cache_disk_that_is_read_only(origin: Path, disk: Callable[[int], Path], tmp_path: Path) -> None:
    path = disk(16)
    subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)
    assert "ead-only" in refused(origin, tmp_path, path / "cache")
    assert "ead-only" in refused(origin, tmp_path, path)


# -- two mounts, one cache


def test_two_mounts_that_share_a_cache_fetch_each_block_once(
    s3_bucket: S3Bucket, faulty_s3: FaultyServer, tmp_path: Path
) -> None:
    names = [f"shard-{number}.bin" for number in range(4)]
    for name in names:
        s3_bucket.put(name, content(name, 1, 0, _SIZE))
    env = s3_environment(s3_bucket.server, faulty_s3.url)
    works = [tmp_path / "a", tmp_path / "b"]
    options = {"cache_dir": tmp_path / "cache", "range_size": "2MiB"}
    with ExitStack() as stack:
        mounts: list[RealMount] = []
        for work in works:
            work.mkdir()
            mounts.append(stack.enter_context(mounted(s3_bucket.url, work, env=env, **options)))
        readers = [
            (name, background(functools.partial(read_file, mount.path / name)))
            for name in names
            for mount in mounts
        ]
        for name, reader in readers:
            data = reader.result(HANG)
            assert len(data) == _SIZE
            check(data, name, 1)
        for name in names:
            blocks = Counter(
                block
                for start, stop in spans(faulty_s3.seen, name)
                for block in range(start // MIB, -(-stop // MIB))
            )
            assert blocks == Counter(range(6)), name
        for mount in mounts:
            assert status(mount)["cache"]["objects_complete"] == len(names)


# -- evict and pin


def _evicts(mount: RealMount, path: Path) -> bool:
    """`fusecache evict` succeeds: the daemon hears of a close a little later."""
    return mount.command("evict", str(path), check=False).returncode == 0


@pytest.mark.parametrize("passthrough", ["auto", "off"])
def test_evicting_what_is_open_leaves_the_handle_alone(
    origin: Path, tmp_path: Path, passthrough: str
) -> None:
    with mounted(f"file://{origin}", tmp_path, passthrough=passthrough, prefetch_budget=0) as mount:
        path = mount.path / "one.bin"
        is_right(path, "one.bin", _SIZE)
        wait_cached(path, _SIZE)
        fd = os.open(path, os.O_RDONLY)
        done = mount.command("evict", str(path), check=False)
        assert done.returncode == 1
        assert "in use" in done.stderr
        data = in_time(functools.partial(os.pread, dropped(fd), _SIZE, 0))
        check(data, "one.bin", 1)
        assert status(mount)["cache"]["objects_complete"] == 1
        os.close(fd)
        wait_until(lambda: _evicts(mount, path), "an eviction of what nobody has open", HANG)
        assert cached(path) == 0
        is_right(path, "one.bin", _SIZE)
        assert status(mount)["bytes"]["origin"] == 2 * _SIZE


def test_many_readers_open_at_once_what_was_evicted(origin: Path, tmp_path: Path) -> None:
    """The kernel still leads them to what was complete; each of them is sent back, and none twice."""
    with mounted(f"file://{origin}", tmp_path, prefetch_budget=0) as mount:
        path = mount.path / "one.bin"
        for _ in range(3):
            is_right(path, "one.bin", _SIZE)
            wait_cached(path, _SIZE)
            is_right(path, "one.bin", _SIZE)
            wait_until(
                lambda: not mount.command("evict", str(path), check=False).returncode, "eviction", HANG
            )
            readers = [background(functools.partial(_opens_right, path)) for _ in range(24)]
            for reader in readers:
                reader.result(HANG)


def _opens_right(path: Path) -> None:
    """Nothing before the open(2), so that many of them meet."""
    fd = os.open(path, os.O_RDONLY)
    try:
        check(os.pread(fd, _SIZE, 0), "one.bin", 1)
    finally:
        os.close(fd)


def test_an_open_without_a_path_keeps_nothing_from_eviction(origin: Path, tmp_path: Path) -> None:
    """It is answered ESTALE first, and passthrough is made ready for an open that never comes."""
    with mounted(f"file://{origin}", tmp_path, prefetch_budget=0, open_wait=0) as mount:
        path = mount.path / "one.bin"
        fd = os.open(path, os.O_RDONLY)
        check(in_time(functools.partial(os.pread, fd, _SIZE, 0)), "one.bin", 1)
        wait_cached(path, _SIZE)
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        check(in_time(functools.partial(os.pread, dropped(again), _SIZE, 0)), "one.bin", 1)
        os.close(again)
        os.close(fd)
        wait_until(lambda: _evicts(mount, path), "an eviction of what nobody has open", HANG)


def test_what_is_pinned_stays(big: Path, tmp_path: Path) -> None:
    for name in ("keep.bin", "other.bin"):
        (big / name).write_bytes(content(name, 1, 0, _SIZE))
    with mounted(f"file://{big}", tmp_path, cache_size="20MiB", prefetch_budget=0) as mount:
        keep = mount.path / "keep.bin"
        is_right(keep, "keep.bin", _SIZE)
        wait_cached(keep, _SIZE)
        mount.command("pin", str(keep))
        assert "pinned" in mount.command("evict", str(keep), check=False).stderr
        is_right(mount.path / "model.safetensors", "model.safetensors", _BIG)
        is_right(mount.path / "other.bin", "other.bin", _SIZE)
        assert cached(keep) == _SIZE
        mount.command("evict", "--all", "--cache-dir", str(tmp_path / "cache"))
        assert cached(keep) == _SIZE
        mount.command("unpin", str(keep))
        mount.command("evict", str(keep))
        assert cached(keep) == 0
        is_right(keep, "keep.bin", _SIZE)
