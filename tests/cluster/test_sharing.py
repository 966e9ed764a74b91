"""One download per cluster, through real mounts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.live import background, is_right
from tests.support.mounting import needs_fuse
from tests.support.nodes import MIB, Nodes, fill
from tests.support.servers import S3Bucket

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
