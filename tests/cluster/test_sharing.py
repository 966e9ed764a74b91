"""One download per cluster, through real mounts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.live import HANG, background, dropped, is_right
from tests.support.mounting import needs_fuse
from tests.support.nodes import MIB, Nodes, fill
from tests.support.servers import S3Bucket, wait_until
from tests.support.slowdisk import SlowDisk, slow_disk

pytestmark = needs_fuse

SIZE = 12 * MIB + 4321


def read_all(nodes: Nodes, keys: list[str], *names: str) -> None:
    """All nodes at once read, and check, everything."""

    def work(name: str) -> None:
        for key in keys:
            is_right(nodes.mounts[name].path / key, key, SIZE)

    running = [background(lambda name=name: work(name)) for name in names]
    for future in running:
        future.result(60)


@pytest.fixture
def keys(shared_bucket: S3Bucket) -> list[str]:
    return fill(shared_bucket, "sharing", 3, SIZE)


def test_three_nodes_take_one_copy_from_the_origin(
    start_cluster: Callable[..., Nodes], keys: list[str]
) -> None:
    nodes = start_cluster("sharing", "a", "b", "c")
    for name in "abc":
        nodes.mount(name)
    nodes.wait_members("a", "b", "c")
    read_all(nodes, keys, "a", "b", "c")
    assert nodes.origin_bytes() == 3 * SIZE
    for name in "abc":
        status = nodes.ask(name, "status")
        assert status["bytes"]["peer"] + status["bytes"]["origin"] == 3 * SIZE
        assert status["peers"]["fallbacks"] == 0


def test_nodes_without_disks_share_what_they_have_in_memory(
    start_cluster: Callable[..., Nodes], keys: list[str], tmp_path: Path
) -> None:
    nodes = start_cluster("sharing", "a", "b")
    for name in "ab":
        nodes.mount(name, store="off", memory_size="64MiB")
    nodes.wait_members("a", "b")
    read_all(nodes, keys, "a", "b")
    assert nodes.origin_bytes() == 3 * SIZE
    assert not list(tmp_path.rglob("*.data"))


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[SlowDisk]:
    with slow_disk(tmp_path, size=200 * MIB, per_second=8 * MIB) as disk:
        yield disk


def test_what_is_on_a_slow_disk_comes_from_a_node_that_is_faster(
    slow: SlowDisk, shared_bucket: S3Bucket, start_cluster: Callable[..., Nodes], tmp_path: Path
) -> None:
    (key,) = fill(shared_bucket, "slowly", 1, SIZE)
    nodes = start_cluster("slowly", "fast", "slow")
    nodes.mount("fast")
    options = {"cache_dir": slow.path / "cache", "memory_dir": tmp_path, "memory_size": "64MiB"}
    with nodes.mounted("slow", prefix=slow.prefix, store="on", **options) as mount:
        nodes.wait_members("fast", "slow")
        is_right(mount.path / key, key, SIZE)
        is_right(nodes.mounts["fast"].path / key, key, SIZE)
        assert nodes.origin_bytes() == SIZE
    (data,) = slow.path.rglob("*.data")

    with nodes.mounted("slow", prefix=slow.prefix, store="auto", **options) as mount:
        nodes.wait_members("fast", "slow")
        wait_until(lambda: nodes.ask("slow", "status")["peers"]["pace"], "a sample of the other node", HANG)
        is_right(mount.path / key, key, SIZE)  # what is in the page cache is read from there
        assert nodes.ask("slow", "status")["bytes"]["peer"] == 0
        _leave_the_page_cache(data)
        is_right(mount.path / key, key, SIZE)
        status = nodes.ask("slow", "status")
        assert (status["bytes"]["peer"], status["bytes"]["origin"]) == (SIZE, 0)
        assert status["cache"]["pace_read"] < status["peers"]["pace"]
        assert status["cache"]["memory_used"] >= SIZE


def _leave_the_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        dropped(file.fileno())
