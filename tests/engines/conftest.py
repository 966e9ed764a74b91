"""Fixtures of the engine tests: mounts that last, models on the local disk, engines in processes of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.library import MODES, Library, Mounts
from tests.engines.process import Engine, environment
from tests.support.servers import S3Bucket


@pytest.fixture(scope="session")
def mounts(shared_bucket: S3Bucket, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounts]:
    """`mounts["kernel"]`, `mounts["daemon"]`."""
    with contextlib.ExitStack() as stack:
        yield Mounts(shared_bucket, tmp_path_factory.mktemp("mounts"), stack)


@pytest.fixture(params=list(MODES))
def library(request: pytest.FixtureRequest, mounts: Mounts) -> Library:
    """Each way of reading in turn."""
    return mounts[request.param]


@pytest.fixture
def plain(mounts: Mounts) -> Library:
    """A mount with all defaults."""
    return mounts["kernel"]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where engines keep caches and logs."""
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def loaders(home: Path) -> Iterator[Engine]:
    """tests/engines/loaders.py, running."""
    engine = Engine("tests.engines.loaders", home / "loaders.log", environment(home))
    yield engine
    engine.close()
