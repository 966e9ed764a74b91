"""The findings of the doctor: each check with a machine or server that is well, and one that is not."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from fusecache.cli import checks, checks_source
from fusecache.cli import main as cli
from fusecache.config.load import load_mount_config
from fusecache.config.model import SourceConfig, Tuning
from fusecache.control.mountinfo import find_file_system


@pytest.mark.parametrize(
    ("release", "state"),
    [
        ("6.9.0", "ok"),
        ("6.18.4-x", "ok"),
        ("7.0", "ok"),
        ("6.8.12", "warn"),
        ("5.15.0-91", "warn"),
        ("?", "warn"),
    ],
)
def test_kernel(release: str, state: str) -> None:
    assert checks.check_kernel(release).state == state


def test_privileges(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tx\nCapEff:\t0000000000200000\n")
    assert checks.has_sys_admin(status)
    status.write_text("Name:\tx\nCapEff:\t000001ffffdfffff\n")
    assert not checks.has_sys_admin(status)
    assert checks.check_privilege(True).state == "ok"
    assert checks.check_privilege(False).state == "warn"


def test_device(tmp_path: Path) -> None:
    assert checks.check_device(Path("/dev/null")).state == "ok"
    assert checks.check_device(tmp_path / "fuse").state == "fail"
    assert checks.check_device(tmp_path).state == "fail"


def test_fusermount() -> None:
    assert checks.check_fusermount("/usr/bin/fusermount3", False).state == "ok"
    assert checks.check_fusermount(None, True).state == "ok"
    assert checks.check_fusermount(None, False).state == "fail"


def test_allow_other(tmp_path: Path) -> None:
    conf = tmp_path / "fuse.conf"
    assert checks.check_allow_other(conf).state == "fail"
    conf.write_text("# user_allow_other\n")
    assert checks.check_allow_other(conf).state == "fail"
    conf.write_text("#x\nuser_allow_other\n")
    assert checks.check_allow_other(conf).state == "ok"


@pytest.mark.parametrize(
    ("kind", "state", "text"),
    [
        ("ext4", "ok", ""),
        ("xfs", "ok", ""),
        ("overlay", "fail", "refuses passthrough"),
        ("nfs4", "warn", "local"),
        ("fuse.sshfs", "warn", "local"),
        ("tmpfs", "warn", "memory"),
    ],
)
def test_cache_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, state: str, text: str
) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(
        f"1 0 0:1 / / rw - btrfs / rw\n2 1 0:2 / {tmp_path} rw - {kind} x rw\n3 2 0:3 / {tmp_path}/y rw - xfs x rw\n"
    )
    monkeypatch.setattr(checks, "find_file_system", lambda path: find_file_system(path, mountinfo))
    found = checks.check_file_system(tmp_path / "not" / "yet")
    assert found.state == state
    assert text in found.detail
    assert bool(found.mend) == (state != "ok")


def test_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_writable(tmp_path).state == "ok"
    assert checks.check_writable(tmp_path / "new").state == "ok"
    assert checks.check_writable(tmp_path / "not" / "yet").state == "fail"
    (tmp_path / "file").write_text("")
    assert checks.check_writable(tmp_path / "file").state == "fail"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert checks.check_writable(tmp_path).state == "fail"


@pytest.mark.parametrize(("free", "state"), [(3 << 30, "fail"), (10 << 30, "warn"), (50 << 30, "ok")])
def test_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, state: str) -> None:
    real = os.statvfs(tmp_path)
    numbers = list(real)
    numbers[1], numbers[2], numbers[4] = 4096, (100 << 30) // 4096, free // 4096
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(numbers))
    assert checks.check_space(tmp_path, None).state == state
    half = load_mount_config("s3://b", "/m", [f"cache_dir={tmp_path},free_space=60%"], env={})
    assert checks.check_space(tmp_path, half).state == "fail"


class Clock(http.server.BaseHTTPRequestHandler):
    """Answers with the Date that the class says."""

    date: str | None = None

    def do_HEAD(self) -> None:
        self.send_response_only(403)
        if self.date is not None:
            self.send_header("Date", self.date)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Clock) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("skew", "state", "text"),
    [
        (0, "ok", "within"),
        (-90, "warn", "behind"),
        (90, "warn", "ahead"),
        (4000, "fail", "signatures are refused"),
    ],
)
def test_clock(endpoint: str, monkeypatch: pytest.MonkeyPatch, skew: float, state: str, text: str) -> None:
    now = 1_800_000_000.0
    monkeypatch.setattr(checks_source.time, "time", lambda: now)
    monkeypatch.setattr(Clock, "date", formatdate(now - skew, usegmt=True))
    found = checks_source.check_clock("clock", endpoint)
    assert found.state == state
    assert text in found.detail


@pytest.mark.parametrize("date", [None, "yesterday"])
def test_a_clock_that_is_not_told(endpoint: str, monkeypatch: pytest.MonkeyPatch, date: str | None) -> None:
    monkeypatch.setattr(Clock, "date", date)
    assert checks_source.check_clock("clock", endpoint).state == "warn"


def test_a_clock_nobody_answers_for() -> None:
    assert checks_source.check_clock("clock", "http://127.0.0.1:1").state == "warn"


@pytest.mark.parametrize(
    ("url", "options", "env", "endpoint"),
    [
        ("s3://b", {}, {}, "https://s3.us-east-1.amazonaws.com"),
        ("s3://b", {"region": "eu-north-1"}, {}, "https://s3.eu-north-1.amazonaws.com"),
        ("s3://b", {}, {"AWS_ENDPOINT_URL": "http://h:1"}, "http://h:1"),
        ("s3://b", {"endpoint_url": "http://g:1"}, {"AWS_ENDPOINT_URL": "http://h:1"}, "http://g:1"),
        ("gs://b", {}, {}, "https://storage.googleapis.com"),
        ("gs://b", {}, {"STORAGE_EMULATOR_HOST": "localhost:4443"}, "http://localhost:4443"),
        ("https://h/x", {}, {}, "https://h/x"),
        ("memory://x", {}, {}, None),
    ],
)
def test_whose_clock_counts(
    url: str, options: dict[str, Any], env: dict[str, str], endpoint: str | None
) -> None:
    assert checks_source.find_endpoint(SourceConfig(url=url, **options), env) == endpoint


def credentials(env: dict[str, str] | None = None, **options: Any) -> checks.Check:
    return checks_source.check_credentials("credentials", SourceConfig(**options), env or {})


def test_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert credentials(url="s3://b", anonymous=True).detail == "anonymous"
    assert credentials(url="s3://b", access_key_id="k", secret_access_key="s3cr3t").state == "ok"
    assert credentials(url="memory://x").state == "ok"
    assert credentials(url="gs://b", credentials_file=str(tmp_path / "missing")).state == "fail"
    assert credentials(url="gs://b", credentials_file=str(tmp_path)).state == "ok"
    assert credentials({"STORAGE_EMULATOR_HOST": "x"}, url="gs://b").state == "ok"
    assert credentials(url="gs://b").state == "fail"
    assert credentials(url="s3://b").state == "fail"
    assert credentials(url="s3://b", profile="nope").state == "fail"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    found = credentials(url="s3://b")
    assert (found.state, found.detail) == ("ok", "AWS, from env")


def test_a_local_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("x")
    source = SourceConfig(url=f"file://{tmp_path}/data")
    assert checks_source.check_reachable("source", source, Tuning()).state == "ok"
    (tmp_path / "data" / "file").unlink()
    assert checks_source.check_reachable("source", source, Tuning()).state == "warn"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.run_command(["doctor", "--cache-dir", str(tmp_path / "not" / "yet")])
    out = capsys.readouterr().out
    assert code == 1
    assert "fail  cache dir" in out
    assert "mkdir -p" in out
    assert cli.run_command(["doctor", "--json", "--cache-dir", str(tmp_path)]) in (0, 1)
    names = [check["name"] for check in json.loads(capsys.readouterr().out)]
    assert names[:4] == ["kernel", "privileges", "device", "fusermount3"]
