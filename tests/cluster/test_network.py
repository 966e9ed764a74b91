"""A network that is cut, and a node that is slow: in namespaces with limited links."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.cluster.lab import Host, Lab, possible
from benchmarks.processes import BenchmarkError
from tests.support.faulty import FaultyServer
from tests.support.live import HANG, asked, background, is_right, wait_cached
from tests.support.mounting import needs_fuse, s3_environment
from tests.support.nodes import MIB, Nodes, cluster, fill
from tests.support.servers import S3Bucket, S3Server, wait_until

pytestmark = [needs_fuse, pytest.mark.skipif(bool(possible()), reason=f"no namespaces: {possible()}")]

SIZE = 8 * MIB + 5
RATE = 100e6


def test_a_lab_leaves_nothing_behind() -> None:
    made: list[Host] = []

    def fail() -> None:
        with Lab() as lab:
            made.append(lab.host("one", 1e6))
            raise BenchmarkError("on purpose")

    with pytest.raises(BenchmarkError, match="on purpose"):
        fail()
    [host] = made
    assert not Path(f"/run/netns/{host.namespace}").exists()
    assert not Path(f"/sys/class/net/{host.outside}").exists()


@pytest.fixture
def networked(
    tmp_path: Path, s3_server: S3Server, shared_bucket: S3Bucket
) -> Iterator[Callable[..., tuple[Nodes, dict[str, Host]]]]:
    """A cluster with a namespace per node; the origin is a proxy on the bridge's side."""
    with contextlib.ExitStack() as stack:

        def start(*names: str) -> tuple[Nodes, dict[str, Host]]:
            lab = stack.enter_context(Lab())
            proxy = stack.enter_context(FaultyServer(s3_server.endpoint, host=lab.gateway))
            env = s3_environment(s3_server, proxy.url)
            hosts = {name: lab.host(name, RATE) for name in names}
            nodes = stack.enter_context(cluster(tmp_path, f"{shared_bucket.url}/network", env, *names))
            nodes.hosts = hosts
            return nodes, hosts

        yield start


@pytest.fixture
def keys(shared_bucket: S3Bucket) -> list[str]:
    return fill(shared_bucket, "network", 2, SIZE)


def read_all(nodes: Nodes, keys: list[str], *names: str) -> None:
    def work(name: str) -> None:
        for key in keys:
            is_right(nodes.mounts[name].path / key, key, SIZE)

    for reader in [background(lambda name=name: work(name)) for name in names]:
        reader.result(60)


def test_a_node_that_is_cut_off_serves_what_it_has_and_comes_back(
    networked: Callable[..., tuple[Nodes, dict[str, Host]]], keys: list[str]
) -> None:
    nodes, hosts = networked("a", "b", "c")
    for name in "abc":
        nodes.mount(name)
    nodes.wait_members("a", "b", "c")
    read_all(nodes, keys[:1], "c")
    wait_cached(nodes.mounts["c"].path / keys[0], SIZE)
    hosts["c"].cut()
    wait_until(lambda: nodes.states("a").get("c") == "dead", "c is seen dead", HANG)
    read_all(nodes, keys, "a", "b")
    read_all(nodes, keys[:1], "c")
    hosts["c"].cut(connected=True)
    nodes.wait_members("a", "b", "c")
    read_all(nodes, keys, "c")


def test_a_node_with_a_hundredth_of_the_bandwidth_holds_nobody_up(
    networked: Callable[..., tuple[Nodes, dict[str, Host]]], keys: list[str]
) -> None:
    nodes, hosts = networked("a", "b", "c", "d")
    hosts["d"].limit(RATE / 100)
    for name in "abcd":
        nodes.mount(name)
    nodes.wait_members("a", "b", "c", "d")
    read_all(nodes, keys, "a", "b", "c")
    assert all(asked(nodes.mounts[name], "status")["reads"]["failed"] == 0 for name in "abc")
