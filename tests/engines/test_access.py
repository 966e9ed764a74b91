"""How engines open and read safetensors, on a real mount: what test_posix_reading.py does not have yet."""

from __future__ import annotations

import ctypes
import functools
import json
import mmap
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.support.content import check, content
from tests.support.faulty import FaultyServer
from tests.support.live import (
    HANG,
    MIB,
    Gate,
    asked,
    background,
    dropped,
    in_time,
    starts_at,
    status,
    wait_cached,
)
from tests.support.mounting import RealMount, mounted, needs_fuse, s3_environment
from tests.support.servers import S3Bucket, wait_until

safetensors = pytest.importorskip("safetensors")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

pytestmark = needs_fuse

_SHARDS = 3
_TENSORS = 4
_SHAPE = (700, 1031)
_SIZE = 16 * MIB + 4321


def tensor(shard: int, number: int) -> np.ndarray:
    """A tensor whose values tell where it comes from."""
    length = _SHAPE[0] * _SHAPE[1] * 2
    return np.frombuffer(content(f"{shard}/{number}", 1, 0, length), np.uint16).reshape(_SHAPE)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three shards with an index, and one file of plain bytes."""
    made = tmp_path_factory.mktemp("origin")
    weights: dict[str, str] = {}
    for shard in range(_SHARDS):
        name = f"model-{shard + 1:05d}-of-{_SHARDS:05d}.safetensors"
        tensors = {f"layer.{shard}.{number}": tensor(shard, number) for number in range(_TENSORS)}
        safetensors_numpy.save_file(tensors, made / name)
        weights |= dict.fromkeys(tensors, name)
    (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    (made / "plain.dat").write_bytes(content("plain.dat", 1, 0, _SIZE))
    return made


@pytest.fixture(scope="module", params=["passthrough", "daemon", "no-wait"])
def mount(
    request: pytest.FixtureRequest, origin: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealMount]:
    """With all defaults; without passthrough; and read while it is fetched."""
    options: dict[str, object] = {"passthrough": "off"} if request.param == "daemon" else {}
    options |= {"open_wait": 0} if request.param == "no-wait" else {}
    with mounted(f"file://{origin}", tmp_path_factory.mktemp(request.param), **options) as made:
        yield made


def shards(mount: RealMount) -> list[Path]:
    return sorted(mount.path.glob("*.safetensors"))


# -- safetensors


def test_safe_open_gives_every_tensor(mount: RealMount) -> None:
    for _ in range(2):  # cold, then warm
        for shard, path in enumerate(shards(mount)):
            with safetensors.safe_open(path, framework="numpy") as file:
                assert sorted(file.keys()) == [f"layer.{shard}.{number}" for number in range(_TENSORS)]
                for number in reversed(range(_TENSORS)):
                    found = file.get_tensor(f"layer.{shard}.{number}")
                    assert np.array_equal(found, tensor(shard, number))


def test_a_slice_of_a_tensor_is_read_alone(mount: RealMount) -> None:
    with safetensors.safe_open(shards(mount)[1], framework="numpy") as file:
        part = file.get_slice("layer.1.2")[10:20, 5:9]
        assert np.array_equal(part, tensor(1, 2)[10:20, 5:9])


def test_ranks_load_the_same_shards_at_once(mount: RealMount) -> None:
    """As processes of tensor parallelism do, each its own part of every tensor."""
    script = textwrap.dedent(
        """
        import sys, hashlib
        from safetensors import safe_open
        rank, total, sha = int(sys.argv[1]), int(sys.argv[2]), hashlib.sha256()
        for path in sys.argv[3:]:
            with safe_open(path, framework="numpy") as file:
                for name in sorted(file.keys()):
                    rows = file.get_slice(name).get_shape()[0] // total
                    sha.update(file.get_slice(name)[rank * rows : (rank + 1) * rows].tobytes())
        print(sha.hexdigest())
        """
    )
    ranks = 4
    paths = [str(path) for path in shards(mount)]
    through = ranks_read(script, ranks, paths)
    origin = Path(status(mount)["sources"][0]["identity"].removeprefix("file://"))
    assert through == ranks_read(script, ranks, [str(origin / Path(path).name) for path in paths])


def ranks_read(script: str, ranks: int, paths: list[str]) -> list[str]:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(ranks), *paths], stdout=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    return [process.communicate(timeout=60)[0].strip() for process in started]


def test_load_file_and_plain_reads_agree(mount: RealMount) -> None:
    loaded = safetensors_numpy.load_file(shards(mount)[0])
    again = safetensors_numpy.load(shards(mount)[0].read_bytes())
    assert loaded.keys() == again.keys()
    for name, found in loaded.items():
        assert np.array_equal(found, again[name])
        assert np.array_equal(found, tensor(0, int(name.rpartition(".")[2])))


# -- the same file in several ways at once


def test_a_mapping_a_direct_and_a_buffered_reader_of_one_file(mount: RealMount) -> None:
    path = mount.path / "plain.dat"
    buffered, direct = os.open(path, os.O_RDONLY), os.open(path, os.O_RDONLY | os.O_DIRECT)
    private = mmap.mmap(buffered, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)

    def by_mapping(at: int) -> None:
        check(private[at : at + MIB], "plain.dat", 1, at)

    def by_direct(at: int) -> None:
        page = mmap.mmap(-1, MIB)
        got = os.preadv(direct, [page], at)
        assert got == min(MIB, _SIZE - at)
        check(page[:got], "plain.dat", 1, at)

    def by_read(at: int) -> None:
        check(os.pread(dropped(buffered), MIB, at), "plain.dat", 1, at)

    with ThreadPoolExecutor(12) as pool:
        ways = [
            pool.submit(way, at) for at in range(0, _SIZE, MIB) for way in (by_mapping, by_direct, by_read)
        ]
        for way in ways:
            way.result(HANG)
    private.close()
    os.close(buffered)
    os.close(direct)


def test_direct_reads_follow_the_alignment_that_statx_tells(mount: RealMount) -> None:
    path = mount.path / "plain.dat"
    memory, offset = dio_alignment(path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    page = mmap.mmap(-1, 2 * MIB)
    view = memoryview(page)
    try:
        for at in (offset, 3 * offset, _SIZE // offset * offset):
            got = os.preadv(fd, [view[memory : memory + 256 * offset]], at)
            assert got == min(256 * offset, _SIZE - at)
            check(view[memory : memory + got], "plain.dat", 1, at)
    finally:
        view.release()
        os.close(fd)


def dio_alignment(path: Path) -> tuple[int, int]:
    """Of memory and of offsets, in bytes; 4096 where statx tells nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = (ctypes.c_uint8 * 256)()
    assert libc.statx(-100, os.fsencode(path), 0, 0x2000, buffer) == 0
    told = np.frombuffer(bytes(buffer), np.uint32)
    if not told[0] & 0x2000 or not told[39]:
        return 4096, 4096
    return int(told[38]), int(told[39])


def test_advice_is_taken(mount: RealMount) -> None:
    fd = os.open(mount.path / "plain.dat", os.O_RDONLY)
    try:
        for advice in ("NORMAL", "SEQUENTIAL", "RANDOM", "NOREUSE", "WILLNEED", "DONTNEED"):
            os.posix_fadvise(fd, MIB, 2 * MIB, getattr(os, f"POSIX_FADV_{advice}"))
            check(in_time(functools.partial(os.pread, fd, MIB, 2 * MIB)), "plain.dat", 1, 2 * MIB)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.readahead.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_size_t]
        assert libc.readahead(fd, 0, 4 * MIB) == 0
        with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
            for advice in ("SEQUENTIAL", "RANDOM", "WILLNEED", "DONTNEED", "POPULATE_READ", "HUGEPAGE"):
                if hasattr(mmap, f"MADV_{advice}"):
                    mapping.madvise(getattr(mmap, f"MADV_{advice}"))
                check(mapping[5 * MIB : 6 * MIB], "plain.dat", 1, 5 * MIB)
    finally:
        os.close(fd)


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
@pytest.mark.parametrize("engine", ["io_uring", "libaio"])
def test_64_asynchronous_reads_in_flight_while_it_is_fetched(engine: str, tmp_path: Path) -> None:
    """Random, direct, cold: every read waits for its own block. fio checks the bytes."""
    origin = tmp_path / "origin"
    origin.mkdir()
    job = ["--name=job", "--size=16MiB", "--bs=64KiB", "--verify=crc32c", "--allrandrepeat=1", "--minimal"]

    def fio(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["fio", *job, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )

    wrote = fio(f"--filename={origin / 'data'}", "--rw=randwrite", "--ioengine=psync", "--do_verify=0")
    assert wrote.returncode == 0, wrote.stderr
    with mounted(f"file://{origin}", tmp_path, range_size="1MiB") as mount:
        read = fio(
            f"--filename={mount.path / 'data'}",
            "--rw=randread",
            "--verify_only",
            "--readonly",
            f"--ioengine={engine}",
            "--direct=1",
            "--iodepth=64",
        )
        if "engine" in read.stderr and "not" in read.stderr:
            pytest.skip(f"this fio or kernel has no {engine}")
        assert read.returncode == 0, read.stdout + read.stderr


# -- becoming complete


def test_a_file_that_becomes_complete_while_it_is_open(
    s3_bucket: S3Bucket, faulty_s3: FaultyServer, tmp_path: Path
) -> None:
    """The next open has passthrough, and the same inode number; old handles and mappings go on beside it."""
    key = "model.safetensors"
    s3_bucket.put(key, content(key, 1, 0, _SIZE))
    env = s3_environment(s3_bucket.server, faulty_s3.url)
    options = {"concurrency": 2, "range_size": "4MiB", "open_wait": 0}
    with mounted(s3_bucket.url, tmp_path, env=env, **options) as mount:
        path = mount.path / key
        held = Gate(faulty_s3, starts_at(key, 12 * MIB))
        before = os.open(path, os.O_RDONLY)
        check(in_time(functools.partial(os.pread, before, MIB, 0)), key, 1)
        held.wait()
        also = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # not complete yet: the same way
        assert status(mount)["opens"] == {"passthrough": 0, "daemon": 2}
        mapping = mmap.mmap(also, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        waiting = background(functools.partial(os.pread, before, MIB, 13 * MIB))
        wait_until(lambda: asked(mount, "status")["loader"]["waiting_reads"] > 0, "a read that waits", HANG)
        held.open()
        check(waiting.result(HANG), key, 1, 13 * MIB)
        wait_cached(path, _SIZE)

        after = os.open(path, os.O_RDONLY)
        found = status(mount)
        if found["mode"]["now"] == "passthrough":
            assert found["opens"] == {"passthrough": 1, "daemon": 2}
        assert os.fstat(after).st_ino == os.fstat(before).st_ino == path.stat().st_ino
        for fd in (before, also, after):
            data = in_time(functools.partial(os.pread, dropped(fd), _SIZE + 1, 0))
            assert len(data) == _SIZE
            check(data, key, 1)
        check(mapping[:], key, 1)
        mapping.close()
        for fd in (before, also, after):
            os.close(fd)
