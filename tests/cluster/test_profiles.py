"""A node that never read a model follows the profile that another one recorded."""

from __future__ import annotations

from collections.abc import Callable

from safetensors.numpy import save

from tests.integration.test_profiles import SHARDS, TENSOR, WANTED, begin, end, tensor
from tests.support.mounting import needs_fuse
from tests.support.nodes import Nodes
from tests.support.servers import S3Bucket, wait_until

pytestmark = needs_fuse


def test_a_node_without_a_recording_takes_that_of_another(
    start_cluster: Callable[..., Nodes], shared_bucket: S3Bucket
) -> None:
    for number, key in enumerate(SHARDS):
        shared_bucket.put(f"orders/m/{key}", save({f"t{n}": tensor(number, f"t{n}") for n in range(6)}))
    nodes = start_cluster("orders", "a", "b")
    options = {"block_size": "64KiB", "range_size": "256KiB", "open_wait": 0, "passthrough": "off"}
    options |= {"read_ahead": "64KiB", "peers__stripe": "64KiB"}
    first, second = nodes.mount("a", **options), nodes.mount("b", **options)
    nodes.wait_members("a", "b")
    end(begin(first, WANTED), WANTED)
    wait_until(lambda: nodes.ask("a", "status")["orders"]["recorded"] == 1, "a recording", 30)
    wait_until(lambda: nodes.ask("b", "status")["orders"]["stored"] == 1, "it came to its home", 10)
    before = sum(nodes.ask("b", "status")["bytes"][tier] for tier in ("peer", "origin"))
    end(begin(second, WANTED), WANTED)
    status = nodes.ask("b", "status")
    assert status["orders"]["replayed"] == 1
    assert status["orders"]["recorded"] == 0
    taken = sum(status["bytes"][tier] for tier in ("peer", "origin")) - before
    missing = 3 * 6 * TENSOR - before
    """Bytes that node b did not fetch for node a."""
    assert 0 < taken < missing / 2
