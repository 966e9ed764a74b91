"""Nodes that die, hang, lie, fill up or disagree: readers get the right bytes, in time."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fusecache.config.units import format_size
from tests.support.content import check
from tests.support.faulty import FaultyServer
from tests.support.live import HANG, asked, background, cached, in_time, is_right, wait_cached
from tests.support.mounting import command, needs_fuse, s3_environment
from tests.support.nodes import MIB, Nodes, answering, cluster, daemon_pid, fill, kill_node, report
from tests.support.servers import S3Bucket, S3Server, wait_until

pytestmark = needs_fuse

SIZE = 10 * MIB + 777
DEADLINE = 60.0
Start = Callable[..., Nodes]


@pytest.fixture
def keys(shared_bucket: S3Bucket) -> list[str]:
    """Two objects below faults/."""
    return fill(shared_bucket, "faults", 2, SIZE)


def read_all(nodes: Nodes, name: str, keys: Iterable[str]) -> None:
    """One node reads and checks everything, within the deadline of a read."""

    def work() -> None:
        for key in keys:
            is_right(nodes.mounts[name].path / key, key, SIZE)

    in_time(work, DEADLINE)


def mount_all(nodes: Nodes, *names: str, **options: object) -> None:
    """Mount these, and wait until they know each other."""
    for name in names:
        nodes.mount(name, **options)
    nodes.wait_members(*names)


def evicted(nodes: Nodes, name: str) -> None:
    """Empty a node's cache."""
    mount = nodes.mounts[name]
    wait_until(
        lambda: (
            command("evict", "--all", str(mount.path), env=mount.env, check=False).returncode == 0
            and asked(mount, "status")["cache"]["objects_complete"] == 0
        ),
        f"the cache of {name} is empty",
        HANG,
    )


@pytest.fixture
def proxied(
    tmp_path: Path, s3_server: S3Server, shared_bucket: S3Bucket
) -> Iterator[tuple[Callable[..., Nodes], FaultyServer]]:
    """A cluster whose origin can fail."""
    with FaultyServer(s3_server.endpoint) as proxy:
        env = s3_environment(s3_server, proxy.url)

        def start(*names: str) -> Nodes:
            return made.enter_context(cluster(tmp_path, f"{shared_bucket.url}/faults", env, *names))

        with ExitStack() as made:
            yield start, proxy


def test_a_node_that_is_killed_costs_its_share_and_no_error(start_cluster: Start, keys: list[str]) -> None:
    nodes = start_cluster("faults", "a", "b", "c")
    mount_all(nodes, "a", "b", "c")
    readers = [background(lambda name=name: read_all(nodes, name, keys)) for name in "ab"]
    wait_until(lambda: nodes.ask("b", "status")["bytes"]["peer"] > 0, "the exchange is under way", HANG)
    kill_node(nodes.mounts["c"])
    for reader in readers:
        reader.result(DEADLINE)
    wait_until(lambda: nodes.states("a").get("c", "dead") == "dead", "c is seen dead", HANG)
    del nodes.mounts["c"]
    taken = sum(asked(mount, "status")["bytes"]["origin"] for mount in nodes.mounts.values())
    # Each byte at most once: the next in order takes over c's stripes, and the other node asks that one.
    assert 0 < taken <= 2 * SIZE


def test_a_node_that_is_stopped_for_half_a_minute(start_cluster: Start, keys: list[str]) -> None:
    nodes = start_cluster("faults", "a", "b", "c")
    mount_all(nodes, "a", "b", "c")
    pid = daemon_pid(nodes.mounts["c"])
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(30, os.kill, (pid, signal.SIGCONT))
    timer.start()
    try:
        for reader in [background(lambda name=name: read_all(nodes, name, keys)) for name in "ab"]:
            reader.result(DEADLINE)
        timer.join()
    finally:
        timer.cancel()
        os.kill(pid, signal.SIGCONT)
    nodes.wait_members("a", "b", "c")
    before = nodes.origin_bytes()
    read_all(nodes, "c", keys)
    assert nodes.origin_bytes() == before


@pytest.mark.expected_log("sent wrong bytes for block")
def test_a_node_whose_cached_blocks_rot_is_found_out(start_cluster: Start, keys: list[str]) -> None:
    nodes = start_cluster("faults", "a", "b")
    mount_all(nodes, "a", "b")
    read_all(nodes, "b", keys)
    for key in keys:
        wait_cached(nodes.mounts["b"].path / key, SIZE)
    for data in (nodes.work / "b" / "cache").rglob("*"):
        if data.is_file() and data.stat().st_size == SIZE:
            with data.open("r+b") as file:
                for offset in range(0, SIZE, 256 << 10):
                    file.seek(offset + 100)
                    file.write(b"rotten")
    read_all(nodes, "a", keys)
    status = asked(nodes.mounts["a"], "status")
    assert status["peers"]["bad_blocks"] >= 1
    [row] = [row for row in report(nodes.mounts["a"])["members"] if row["name"] == "b"]
    assert row["bad_blocks"] >= 1
    assert "wrong bytes" in row["avoided"]


def test_a_node_with_a_full_disk_reads_and_passes_on_all_the_same(
    start_cluster: Start, keys: list[str], tmp_path: Path
) -> None:
    nodes = start_cluster("faults", "a", "b", "c")
    nodes.mount("a", cache_size="1MiB")
    nodes.mount("b")
    nodes.mount("c")
    nodes.wait_members("a", "b", "c")
    for reader in [background(lambda name=name: read_all(nodes, name, keys)) for name in "abc"]:
        reader.result(DEADLINE)


@pytest.mark.expected_log("the name twin is ours")
def test_two_nodes_with_one_name_say_so_and_read_on(start_cluster: Start, keys: list[str]) -> None:
    nodes = start_cluster("faults", "a", "b")
    nodes.mount("a", peers__node="twin")
    nodes.mount("b", peers__node="twin")

    def clash(name: str) -> bool:
        rows = nodes.ask(name, "peers")["members"]
        return any(row["state"] == "refused" and "the name twin is ours" in row["why"] for row in rows)

    for name in "ab":
        wait_until(lambda name=name: clash(name), "the clash is seen", HANG)
        read_all(nodes, name, keys)


@pytest.mark.expected_log("it speaks protocol 99")
def test_a_node_of_another_protocol_is_left_out(start_cluster: Start, keys: list[str]) -> None:
    nodes = start_cluster("faults", "a", "new")
    health = {
        "name": "new",
        "instance": "1",
        "weight": 1 << 40,
        "tenant": "",
        "protocol": 99,
        "version": "9",
        "time": 0.0,
    }
    with answering(nodes.ports["new"], {"/v1/health": health}):
        nodes.mount("a")
        read_all(nodes, "a", keys)
        [row] = [row for row in report(nodes.mounts["a"])["members"] if row["name"] == "new"]
        assert row["state"] == "refused"
        assert "protocol 99" in row["why"]


@pytest.mark.expected_log("the signature is wrong")
def test_another_secret_opens_nothing_and_hinders_nobody(
    start_cluster: Start, keys: list[str], tmp_path: Path
) -> None:
    nodes = start_cluster("faults", "a", "b")
    other = tmp_path / "other"
    other.write_text("quite another secret of ours")
    nodes.mount("a")
    nodes.mount("b", peers__secret_file=other)
    for name in "ab":
        read_all(nodes, name, keys)
        assert asked(nodes.mounts[name], "status")["bytes"]["peer"] == 0


@pytest.mark.expected_log("it is another tenant")
def test_another_tenant_sees_nothing(start_cluster: Start, keys: list[str]) -> None:
    nodes = start_cluster("faults", "a", "b")
    nodes.mount("a", peers__tenant="red")
    nodes.mount("b", peers__tenant="blue")
    read_all(nodes, "a", keys)
    read_all(nodes, "b", keys)
    assert nodes.origin_bytes() == 4 * SIZE
    assert any("another tenant" in row["why"] for row in report(nodes.mounts["b"])["members"])


def test_the_origin_may_be_down_while_the_nodes_hold_everything(
    proxied: tuple[Callable[..., Nodes], FaultyServer], keys: list[str]
) -> None:
    start, proxy = proxied
    nodes = start("a", "b", "c")
    mount_all(nodes, "a", "b", "c")
    for key in keys:
        for name in "abc":
            assert (nodes.mounts[name].path / key).stat().st_size == SIZE
    read_all(nodes, "a", keys)
    for key in keys:
        wait_cached(nodes.mounts["a"].path / key, SIZE)
    proxy.outage()
    read_all(nodes, "b", keys)
    read_all(nodes, "c", keys)


@pytest.mark.expected_log("tried until the deadline")
def test_the_origin_down_while_nobody_has_it_is_an_error_in_time(
    proxied: tuple[Callable[..., Nodes], FaultyServer], keys: list[str]
) -> None:
    start, proxy = proxied
    nodes = start("a", "b")
    mount_all(nodes, "a", "b", deadline="8s")
    path = nodes.mounts["a"].path / keys[0]
    assert path.stat().st_size == SIZE
    proxy.outage()
    with pytest.raises(OSError, match="Input/output error"):
        in_time(path.read_bytes, 30)
    proxy.clear()
    wait_until(lambda: _readable(path), "it reads again", 40)
    check(path.read_bytes(), keys[0], 1)


def _readable(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return len(in_time(lambda: file.read(4096))) == 4096
    except OSError:
        return False


def test_a_node_that_joins_takes_nothing_from_the_origin(start_cluster: Start, keys: list[str]) -> None:
    nodes = start_cluster("faults", "a", "b", "c")
    mount_all(nodes, "a", "b")
    for name in "ab":
        read_all(nodes, name, keys)
    for key in keys:
        for name in "ab":
            wait_cached(nodes.mounts[name].path / key, SIZE)
    before = nodes.origin_bytes()
    nodes.mount("c")
    nodes.wait_members("a", "b", "c")
    read_all(nodes, "c", keys)
    assert nodes.origin_bytes() == before
    coverage = {item["key"]: item["nodes"] for item in report(nodes.mounts["c"])["coverage"]}
    wait_cached(nodes.mounts["c"].path / keys[0], SIZE)
    assert coverage[keys[0]]["a"] == SIZE
    assert (
        format_size(SIZE) in command("peers", str(nodes.mounts["c"].path), env=nodes.mounts["c"].env).stdout
    )


def test_one_node_serves_what_another_mounts(start_cluster: Start, keys: list[str]) -> None:
    nodes = start_cluster("faults", "store", "gpu")
    process = nodes.serve("store")
    nodes.mount("gpu", peers__listen="")
    wait_until(lambda: nodes.states("gpu").get("store") == "alive", "the store is seen", HANG)
    read_all(nodes, "gpu", keys)
    assert nodes.origin_bytes() == 0
    assert nodes.ask("store", "status")["bytes"]["origin"] == 2 * SIZE
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_what_is_not_ours_need_not_be_kept(start_cluster: Start, keys: list[str]) -> None:
    nodes = start_cluster("faults", "a", "b")
    mount_all(nodes, "a", "b", peers__local_copies="owned")
    for name in "ab":
        read_all(nodes, name, keys)
    held = [sum(cached(nodes.mounts[name].path / key) for key in keys) for name in "ab"]
    assert min(held) >= MIB  # a stripe
    assert sum(held) == 2 * SIZE
    assert nodes.origin_bytes() == 2 * SIZE
