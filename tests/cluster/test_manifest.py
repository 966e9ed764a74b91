"""verify=manifest in a cluster: one download still, and nobody passes on what is in quarantine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.content import content
from tests.support.live import background, in_time, is_right
from tests.support.mounting import failing, needs_fuse
from tests.support.nodes import MIB, Nodes
from tests.support.servers import S3Bucket, wait_until
from tests.support.signed import sums

pytestmark = needs_fuse

SIZE = 6 * MIB + 4321
GOOD, BAD = "model-00001.safetensors", "tampered.bin"


@pytest.mark.expected_log("is not what .* says")
def test_each_node_looks_for_itself(start_cluster: Callable[..., Nodes], shared_bucket: S3Bucket) -> None:
    for key in (GOOD, BAD):
        shared_bucket.put(f"attested/{key}", content(key, 1, 0, SIZE))
    said = {GOOD: content(GOOD, 1, 0, SIZE), BAD: b"something else"}
    shared_bucket.put("attested/SHA256SUMS", sums(said))
    nodes = start_cluster("attested", "a", "b", "c")
    for name in "ab":
        nodes.mount(name, verify="manifest", prefetch_budget=0)
    nodes.mount("c", prefetch_budget=0)
    nodes.wait_members("a", "b", "c")

    reading = [
        background(lambda name=name: is_right(nodes.mounts[name].path / GOOD, GOOD, SIZE)) for name in "ab"
    ]
    for future in reading:
        future.result(60)
    assert nodes.origin_bytes() == SIZE + len(
        sums(said)
    )  # cut through, before anybody had looked at all of it
    assert [nodes.ask(name, "status")["manifest"]["attested"] for name in "ab"] == [1, 1]

    for name in "ab":
        path = nodes.mounts[name].path / BAD
        assert in_time(lambda path=path: failing(path.read_bytes), 60) == "EBADMSG"
    wait_until(
        lambda: all(nodes.ask(name, "status")["cache"]["objects_quarantined"] == 1 for name in "ab"),
        "both to have it in quarantine",
        30,
    )
    given = {name: nodes.ask(name, "status")["peers"]["bytes_out"] for name in "ab"}
    is_right(
        nodes.mounts["c"].path / BAD, BAD, SIZE
    )  # c does not ask for manifests, and the origin has these bytes
    assert {name: nodes.ask(name, "status")["peers"]["bytes_out"] for name in "ab"} == given
