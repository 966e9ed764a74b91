"""The doctor against real servers, as a user runs it: in its own process."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import servers


def doctor(cache: Path, *arguments: str, **env: str) -> tuple[int, dict[str, str], str]:
    """(exit code, state by check name, everything printed)."""
    done = subprocess.run(
        [servers.program("fusecache"), "doctor", "--cache-dir", str(cache), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, **env},
    )
    states = {line[6:].split("  ")[0].strip(): line[:4].strip() for line in done.stdout.splitlines()}
    return done.returncode, states, done.stdout + done.stderr


def test_a_bucket_that_is_well(
    tmp_path: Path, s3_environment: servers.S3Server, s3_bucket: servers.S3Bucket
) -> None:
    s3_bucket.put("llama/config.json", b"{}")
    _, states, text = doctor(tmp_path, s3_bucket.url)
    assert (states["credentials"], states["source"], states["clock"]) == ("ok", "ok", "ok"), text
    assert s3_environment.secret_key not in text
    _, states, text = doctor(tmp_path, s3_bucket.url + "/nothing", "-o", "engine=fsspec")
    assert states["source"] == "warn", text


def test_a_bucket_that_is_missing(tmp_path: Path, s3_environment: servers.S3Server) -> None:
    code, states, text = doctor(tmp_path, "s3://no-such-bucket")
    assert (code, states["source"]) == (1, "fail"), text
    assert "correct the bucket" in text


def test_wrong_credentials(
    tmp_path: Path, s3_environment: servers.S3Server, s3_bucket: servers.S3Bucket
) -> None:
    code, states, text = doctor(tmp_path, s3_bucket.url, AWS_SECRET_ACCESS_KEY="wrong-s3cr3t")
    assert (code, states["source"]) == (1, "fail"), text
    assert "credentials" in text
    assert "wrong-s3cr3t" not in text


def test_nobody_at_the_endpoint(tmp_path: Path, s3_environment: servers.S3Server) -> None:
    nowhere = f"http://127.0.0.1:{servers.free_port()}"
    code, states, text = doctor(
        tmp_path, "s3://bucket", "-o", f"endpoint_url={nowhere},deadline=1s", FUSECACHE_DEBUG=""
    )
    assert (code, states["source"], states["clock"]) == (1, "fail", "warn"), text


def test_several_sources(tmp_path: Path, s3_server: servers.S3Server, s3_bucket: servers.S3Bucket) -> None:
    s3_bucket.put("x", b"1")
    config = tmp_path / "fusecache.toml"
    config.write_text(
        f"""
[sources.good]
url = "{s3_bucket.url}"
endpoint_url = "{s3_server.endpoint}"
region = "{s3_server.region}"
access_key_id = "{s3_server.access_key}"
secret_access_key = "{s3_server.secret_key}"
[sources.local]
url = "file://{tmp_path}"
"""
    )
    config.chmod(0o600)
    _, states, text = doctor(tmp_path, "--config", str(config))
    assert (states["source good"], states["source local"]) == ("ok", "ok"), text


@pytest.mark.parametrize("engine", ["auto", "fsspec"])
def test_a_gcs_bucket(
    tmp_path: Path, gcs_server: servers.GcsServer, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = gcs_server.bucket()
    bucket.put("x", b"1")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.endpoint)
    _, states, text = doctor(tmp_path, bucket.url, "-o", f"engine={engine}")
    assert (states["credentials"], states["source"]) == ("ok", "ok"), text
