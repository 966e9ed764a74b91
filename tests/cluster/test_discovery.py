"""Nodes that find each other in a real etcd, and in DNS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.etcd import EtcdServer, etcd
from tests.support.live import HANG, background, is_right
from tests.support.mounting import command, needs_fuse
from tests.support.nodes import MIB, Nodes, fill, kill_node
from tests.support.servers import S3Bucket, wait_until

pytestmark = needs_fuse

SIZE = 6 * MIB + 99
Start = Callable[..., Nodes]


@pytest.fixture
def keys(shared_bucket: S3Bucket) -> list[str]:
    return fill(shared_bucket, "discovery", 1, SIZE)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EtcdServer]:
    with etcd(tmp_path) as made:
        yield made


def options(server: EtcdServer) -> dict[str, object]:
    return {"peers__discovery": "etcd", "peers__etcd": server.url, "peers__members": None}


def read_all(nodes: Nodes, keys: list[str], *names: str) -> None:
    def work(name: str) -> None:
        for key in keys:
            is_right(nodes.mounts[name].path / key, key, SIZE)

    for reader in [background(lambda name=name: work(name)) for name in names]:
        reader.result(60)


@pytest.mark.expected_log("peers.etcd=.* does not answer")
def test_nodes_meet_in_etcd_and_leave_it(start_cluster: Start, server: EtcdServer, keys: list[str]) -> None:
    server.start()
    nodes = start_cluster("discovery", "a", "b", "c")
    for name in "abc":
        nodes.mount(name, **options(server))
    nodes.wait_members("a", "b", "c")
    read_all(nodes, keys, "a", "b", "c")
    assert nodes.origin_bytes() == SIZE
    command("umount", str(nodes.mounts["c"].path), env=nodes.mounts["c"].env)
    wait_until(lambda: "c" not in nodes.states("a"), "c has left", HANG)
    kill_node(nodes.mounts["b"])
    wait_until(lambda: "b" not in nodes.states("a"), "the lease of b has ended", 2 * HANG)
    for name in "bc":
        del nodes.mounts[name]


@pytest.mark.expected_log("peers.etcd=.* does not answer")
def test_etcd_may_come_late_and_go_away(start_cluster: Start, server: EtcdServer, keys: list[str]) -> None:
    nodes = start_cluster("discovery", "a", "b")
    for name in "ab":
        nodes.mount(name, **options(server))
    assert nodes.states("a") == {"a": "alive"}
    server.start()
    nodes.wait_members("a", "b")
    server.stop()
    read_all(nodes, keys, "a", "b")
    assert nodes.origin_bytes() == SIZE
    assert nodes.states("a") == {"a": "alive", "b": "alive"}
    server.start()
    command("umount", str(nodes.mounts["b"].path), env=nodes.mounts["b"].env)
    del nodes.mounts["b"]
    wait_until(lambda: nodes.states("a").get("b") != "alive", "b is gone", HANG)


def test_a_name_with_addresses(start_cluster: Start, keys: list[str]) -> None:
    nodes = start_cluster("discovery", "a", "b")
    nodes.serve("b")
    dns = {"peers__discovery": "dns", "peers__dns": f"localhost:{nodes.ports['b']}", "peers__members": None}
    nodes.mount("a", **dns, peers__listen="")
    wait_until(lambda: nodes.states("a").get("b") == "alive", "b is found", HANG)
    read_all(nodes, keys, "a")
    assert nodes.origin_bytes() == 0


@pytest.mark.expected_log("Name or service not known")
def test_a_name_without_addresses_keeps_nobody_from_reading(start_cluster: Start, keys: list[str]) -> None:
    nodes = start_cluster("discovery", "a")
    dns = {"peers__discovery": "dns", "peers__dns": "no-such-name.invalid:7070", "peers__members": None}
    nodes.mount("a", **dns)
    read_all(nodes, keys, "a")
    assert nodes.origin_bytes() == SIZE
