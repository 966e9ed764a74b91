"""Fixtures for every test: real servers (started once, on first use), fresh buckets, a clean environment."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import logs, servers
from tests.support.faulty import FaultyServer

_FOREIGN = ("AWS_", "GOOGLE_", "GCLOUD_", "STORAGE_EMULATOR", "FUSECACHE_", "FSSPEC_")
_KEEP = {"FUSECACHE_TEST_RUN", "FUSECACHE_TEST_SOAK", "FUSECACHE_TEST_SEED", "FUSECACHE_TEST_DEADLINE"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No credentials, endpoints or options of the person who runs the tests; no metadata service; locks that check
    who holds them."""
    for name in list(os.environ):
        if name.startswith(_FOREIGN) and name not in _KEEP:
            monkeypatch.delenv(name)
    nothing = tmp_path_factory.getbasetemp() / "no-such-file"
    monkeypatch.setenv("FUSECACHE_DEBUG_LOCKS", "1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(nothing))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(nothing))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(nothing))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture(autouse=True)
def only_expected_logs(request: pytest.FixtureRequest) -> Iterator[None]:
    """A warning or a traceback in the log of a daemon, which the test's markers `expected_log` don't foresee, fails the
    test. The lines of a mount that lives longer than a test belong to the test in which they were written."""
    yield
    expected = [str(word) for marker in request.node.iter_markers("expected_log") for word in marker.args]
    found = logs.WATCH.take_alarms(expected)
    if found:
        pytest.fail("in the log of a daemon:\n" + "\n".join(found), pytrace=False)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.S3Server]:
    """SeaweedFS, for the session; make a bucket per test with `s3_server.bucket()`."""
    with servers.seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.S3Server]:
    """moto, for the session."""
    with servers.moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.GcsServer]:
    """gcp-storage-emulator, for the session."""
    with servers.gcs_emulator(tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture(scope="session")
def shared_bucket(s3_server: servers.S3Server) -> servers.S3Bucket:
    """One bucket of SeaweedFS for all tests that keep to a prefix of their own: a new one costs 0.3 s."""
    return s3_server.bucket("shared")


@pytest.fixture
def s3_bucket(s3_server: servers.S3Server) -> servers.S3Bucket:
    """A new, empty bucket of SeaweedFS."""
    return s3_server.bucket()


@pytest.fixture
def s3_environment(s3_server: servers.S3Server, monkeypatch: pytest.MonkeyPatch) -> servers.S3Server:
    """The standard AWS_* variables point at SeaweedFS."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_REGION", s3_server.region)
    monkeypatch.setenv("AWS_DEFAULT_REGION", s3_server.region)
    return s3_server


@pytest.fixture
def faulty_s3(s3_server: servers.S3Server) -> Iterator[FaultyServer]:
    """A proxy in front of SeaweedFS (same credentials; its `url` is the endpoint) that misbehaves on request."""
    client = s3_server.client()

    def whole(path: str) -> bytes:
        bucket, _, key = path.lstrip("/").partition("/")
        return bytes(client.get_object(Bucket=bucket, Key=urllib.parse.unquote(key))["Body"].read())

    with FaultyServer(s3_server.endpoint) as faulty:
        faulty.fetch_whole_with(whole)
        yield faulty


@pytest.fixture
def faulty_http() -> Iterator[FaultyServer]:
    """An HTTP server with objects of its own (`faulty_http.objects[path] = data`) that misbehaves on request."""
    with FaultyServer() as faulty:
        yield faulty


@pytest.fixture
def short_tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose path is short enough for a unix socket."""
    return tmp_path_factory.mktemp("s")
