"""Fixtures of the cluster tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.mounting import s3_environment
from tests.support.nodes import Nodes, cluster
from tests.support.servers import S3Bucket, S3Server


@pytest.fixture
def start_cluster(
    tmp_path: Path, s3_server: S3Server, shared_bucket: S3Bucket
) -> Iterator[Callable[..., Nodes]]:
    """`start_cluster(prefix, *names)`: a cluster over a prefix of the shared bucket, gone after the test."""
    with ExitStack() as stack:

        def start(prefix: str, *names: str) -> Nodes:
            env = s3_environment(s3_server)
            return stack.enter_context(cluster(tmp_path, f"{shared_bucket.url}/{prefix}", env, *names))

        yield start
