"""How a file comes to be opened with passthrough, and that no open(2) fails on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from tests.support.content import check, content
from tests.support.mounting import RealMount, mounted, needs_fuse
from tests.support.servers import wait_until

pytestmark = needs_fuse

SIZE = (3 << 20) + 77
SHARD = "model-1.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    return directory


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def put(source: Path, key: str, version: int) -> None:
    """Replace a file at once, as an upload does."""
    temporary = source.parent / "upload"
    temporary.write_bytes(content(key, version, 0, SIZE + version))
    temporary.rename(source / key)


def status(mount: RealMount) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(mount.command("status", str(mount.path), "--json").stdout)
    return found


def passthrough(mount: RealMount) -> bool:
    wait_until(lambda: status(mount)["mode"]["why"] != "", "a mode", 10)
    return bool(status(mount)["mode"]["now"] == "passthrough")


def test_a_cold_file_of_weights_is_opened_with_passthrough(
    source: Path, tmp_path: Path, stack: ExitStack
) -> None:
    put(source, SHARD, 1)
    mount = stack.enter_context(mounted(f"file://{source}", tmp_path))
    if not passthrough(mount):
        pytest.skip(status(mount)["mode"]["why"])
    check((mount.path / SHARD).read_bytes(), SHARD, 1)
    assert status(mount)["opens"] == {"passthrough": 1, "daemon": 0}


def test_ranks_that_open_a_cold_shard_at_once_are_all_given_passthrough(
    source: Path, tmp_path: Path, stack: ExitStack
) -> None:
    put(source, SHARD, 1)
    mount = stack.enter_context(mounted(f"file://{source}", tmp_path))
    if not passthrough(mount):
        pytest.skip(status(mount)["mode"]["why"])
    ranks = 8
    together = Barrier(ranks)

    def rank(_number: int) -> bytes:
        together.wait(20)
        return (mount.path / SHARD).read_bytes()

    with ThreadPoolExecutor(ranks) as pool:
        for read in pool.map(rank, range(ranks)):
            check(read, SHARD, 1)
    assert status(mount)["opens"] == {"passthrough": ranks, "daemon": 0}


def test_without_the_wait_the_next_open_is_passthrough(
    source: Path, tmp_path: Path, stack: ExitStack
) -> None:
    put(source, SHARD, 1)
    mount = stack.enter_context(mounted(f"file://{source}", tmp_path, open_wait=0))
    if not passthrough(mount):
        pytest.skip(status(mount)["mode"]["why"])
    with (mount.path / SHARD).open("rb") as first:
        check(first.read(), SHARD, 1)
        wait_until(lambda: status(mount)["cache"]["objects_complete"] == 1, "a complete object", 20)
        with (mount.path / SHARD).open("rb") as second:
            check(second.read(), SHARD, 1)
            assert os.fstat(first.fileno()).st_ino == os.fstat(second.fileno()).st_ino
            assert os.fstat(first.fileno()).st_size == os.fstat(second.fileno()).st_size
        # the same file once more, without a path that could be looked up again
        with open(f"/proc/self/fd/{first.fileno()}", "rb") as third:
            check(third.read(), SHARD, 1)
    assert status(mount)["opens"] == {"passthrough": 1, "daemon": 2}


@pytest.mark.parametrize("open_wait", [0, 5])
def test_a_replaced_file_opens_at_the_first_try(
    source: Path, tmp_path: Path, stack: ExitStack, open_wait: int
) -> None:
    mount = None
    for version in range(1, 6):
        put(source, SHARD, version)
        if mount is None:
            mount = stack.enter_context(mounted(f"file://{source}", tmp_path, open_wait=open_wait))
        mount.command("refresh", str(mount.path))
        for _ in range(3):
            check((mount.path / SHARD).read_bytes(), SHARD, version)


def test_an_evicted_file_opens_at_the_first_try(source: Path, tmp_path: Path, stack: ExitStack) -> None:
    put(source, SHARD, 1)
    mount = stack.enter_context(mounted(f"file://{source}", tmp_path))
    check((mount.path / SHARD).read_bytes(), SHARD, 1)
    wait_until(lambda: status(mount)["cache"]["objects_complete"] == 1, "a complete object")

    def evicted() -> bool:
        return mount.command("evict", str(mount.path / SHARD), check=False).returncode == 0

    wait_until(evicted, "an eviction")  # the handle that was just closed may still be on its way
    check((mount.path / SHARD).read_bytes(), SHARD, 1)
    check((mount.path / SHARD).read_bytes(), SHARD, 1)


@pytest.mark.expected_log("is damaged and is fetched again")
def test_a_byte_flipped_behind_the_back_of_the_mount_is_found(
    source: Path, tmp_path: Path, stack: ExitStack
) -> None:
    put(source, SHARD, 1)
    mount = stack.enter_context(mounted(f"file://{source}", tmp_path))
    check((mount.path / SHARD).read_bytes(), SHARD, 1)
    (data,) = (tmp_path / "cache" / "data").rglob("*.data")
    with data.open("r+b") as raw:
        raw.seek(SIZE // 2)
        flipped = bytes([raw.read(1)[0] ^ 1])
        raw.seek(SIZE // 2)
        raw.write(flipped)
    check((mount.path / SHARD).read_bytes(), SHARD, 1)
    assert status(mount)["cache"]["corrupt_blocks"] == 1
