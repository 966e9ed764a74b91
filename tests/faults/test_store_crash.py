"""kill -9 at any instant, several processes on one directory, and a reboot."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fusecache.errors import StoreError
from fusecache.store.disk.directory import CacheDirectory
from fusecache.store.store import Store
from tests.faults import store_worker as worker
from tests.faults.store_worker import BLOCK, content, fetch, version

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def running(*args: object) -> Iterator[subprocess.Popen[str]]:
    """A worker process; killed at the end."""
    command = [sys.executable, "-m", "tests.faults.store_worker", *map(str, args)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    return (line.strip() for line in process.stdout)


@pytest.mark.parametrize("verify", ["start", "boot"])
def test_killed_at_any_call_the_store_is_right(tmp_path: Path, verify: str) -> None:
    """Every fifth of some 420 calls that change files or locks: before, in the middle of or after it."""
    with running("crash", tmp_path / "cache", verify, 1 + len(verify) % 5, 5, 5000) as process:
        told = list(lines(process))
    assert process.returncode == 0
    assert int(told[-1]) > 60


def test_killed_at_random_times_under_load(tmp_path: Path) -> None:
    choose = random.Random(7)
    limit = 4 << 20
    for seed in range(6):
        with running("churn", tmp_path, limit, 0, seed, 10_000) as process:
            told = lines(process)
            for _ in range(choose.randrange(1, 60)):
                assert next(told).isdecimal()
            process.kill()
    size = 64 << 10
    with Store(tmp_path, limit=limit, free_floor=0, block_size=size) as store:
        assert store.wait_for_scan(30)
        assert worker.disk_usage(tmp_path) <= store.usage().used <= limit
        checked = 0
        for info in store.objects():
            stored = store.open(info.version)
            for block in range(stored.block_count):
                if stored.is_unverified(block):
                    assert stored.verify_block(block)
                    got = os.pread(stored.fileno(), size, block * size)
                    assert got == content(info.version, block, size)
                    checked += 1
            stored.close()
        assert checked > 10
        assert store.usage().corrupt_blocks == 0


@pytest.mark.parametrize("bound", ["limit", "floor"])
def test_two_processes_keep_the_limit_and_the_floor_at_all_times(small_disk: Path, bound: str) -> None:
    """The disk is a tmpfs, so that what is used is one number of the kernel's, asked for all the time."""
    limit, floor = (8 << 20, 0) if bound == "limit" else (1 << 30, 24 << 20)
    others = 1 << 20  # the index, its write-ahead log, and directories
    cache = small_disk / "cache"
    with (
        running("churn", cache, limit, floor, 1, 200) as first,
        running("churn", cache, limit, floor, 2, 200) as second,
    ):
        ends = 0
        for pair in zip(lines(first), lines(second), strict=False):
            disk = os.statvfs(small_disk)
            assert (disk.f_blocks - disk.f_bfree) * disk.f_frsize <= limit + others
            assert disk.f_bavail * disk.f_frsize >= floor - others
            assert all(line.isdecimal() or line == "done" for line in pair), pair
            ends += 1
        assert ends > 100
    with Store(cache, limit=limit, free_floor=floor, block_size=64 << 10) as store:
        assert store.wait_for_scan(30)
        assert store.usage().used == worker.disk_usage(cache)
        assert store.usage().used > limit // 2 if bound == "limit" else store.usage().used > 4 << 20


def test_what_another_process_reads_is_not_evicted_until_it_dies(tmp_path: Path) -> None:
    with Store(tmp_path, limit=100 * BLOCK, free_floor=0, block_size=BLOCK) as store:
        stored = store.open(version("a"))
        assert fetch(stored, range(4))
        stored.close()
        with running("hold", tmp_path, "a") as reader:
            assert next(lines(reader)) == "held"
            with pytest.raises(StoreError, match="in use"):
                store.evict(version("a").id)
            big = store.open(version("big", 98))
            assert not big.reserve_bytes(97 * BLOCK)
        # the kernel dropped its locks
        big.close()
        assert store.evict(version("a").id) > 0


@pytest.mark.parametrize("verify", ["start", "boot"])
def test_after_a_reboot_that_lost_data_nothing_wrong_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: str
) -> None:
    """Without fsync a checksum may reach the disk and its data not: pages of zeros, or an older file."""
    with Store(tmp_path, limit=100 * BLOCK, free_floor=0, block_size=BLOCK, verify=verify) as store:  # type: ignore[arg-type]
        stored = store.open(version("a", 9))
        assert fetch(stored, range(9))
        stored.close()
    cache_directory = CacheDirectory(tmp_path)
    with cache_directory.data_path(stored.version.id).open("r+b") as file:
        for block in (0, 4, 8):
            file.seek(block * BLOCK)
            file.write(bytes(BLOCK // 2))
    cache_directory.close()
    monkeypatch.setattr("fusecache.store.store.read_boot_id", lambda: b"another boot id!")
    with Store(tmp_path, limit=100 * BLOCK, free_floor=0, block_size=BLOCK, verify=verify) as store:  # type: ignore[arg-type]
        again = store.open(version("a", 9))
        assert not any(again.is_present(b) for b in range(9))
        assert all(again.is_unverified(b) for b in range(9))
        assert [b for b in range(9) if not again.verify_block(b)] == [0, 4, 8]
        assert fetch(again, range(9))
        assert again.is_complete
        again.close()
        assert store.usage().corrupt_blocks == 3
