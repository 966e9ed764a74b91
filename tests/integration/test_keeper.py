"""The keeper on real mounts, with a stand-in for the daemon that speaks raw FUSE."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusecache.errors import MountError
from fusecache_mount.lifecycle import fuse_mount
from fusecache_mount.lifecycle.keeper_files import (
    CONNECTION_OPTION,
    PID_NAME,
    find_keeper_by_connection,
    find_keeper_by_directory,
)
from fusecache_mount.lifecycle.keeper_protocol import KEEPER_MODULE
from fusecache_mount.lifecycle.restart_policy import MAX_RESTARTS
from tests.support.kept import Kept, ended, kept
from tests.support.mounting import needs_fuse
from tests.support.servers import wait_until
from tests.support.standin import HELLO

pytestmark = needs_fuse


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Kept]:
    with kept(tmp_path) as made:
        yield made


def test_a_mount_answers_when_launch_returns(mount: Kept) -> None:
    pid = mount.launch()
    assert (mount.mountpoint / "file").read_bytes() == HELLO
    assert mount.told[0]["restarts"] == 0
    assert mount.told[0]["init"] is None
    assert mount.told[0]["runtime_dir"] == str(mount.work / "run")
    assert mount.directory.name == mount.told[0]["mount_id"]
    assert find_keeper_by_directory(mount.directory) == pid
    lines = [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(mount.work) in line]
    assert [line.split()[:3] for line in lines] == [
        ["s3://bucket/prefix", str(mount.mountpoint), "fuse.fusecache"]
    ]
    options = lines[0].split()[3].split(",")
    assert {"ro", "nosuid", "nodev", "noatime", "default_permissions", "max_read=1048576"} <= set(options)


def test_no_secret_in_a_process_list(mount: Kept) -> None:
    pid = mount.launch()
    for process in (pid, mount.told[0]["pid"]):
        for file in ("cmdline", "environ"):
            assert b"mostly-secret" not in Path(f"/proc/{process}/{file}").read_bytes()
    assert "mostly-secret" not in mount.log()


def test_the_keeper_is_detached_and_small(mount: Kept) -> None:
    pid = mount.launch()
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
    assert os.readlink(f"/proc/{pid}/fd/1") == str(mount.directory / "log")
    loaded = Path(f"/proc/{pid}/maps").read_text()
    for library in ("pydantic", "pyfuse3", "obstore"):
        assert library not in loaded


def test_a_killed_daemon_is_replaced_under_a_reader(mount: Kept) -> None:
    mount.launch()
    with (mount.mountpoint / "file").open("rb", buffering=0) as file:
        mount.kill(mount.told[0]["pid"])
        assert file.read() == HELLO
    assert mount.told[1]["restarts"] == 1
    init = base64.b64decode(mount.told[1]["init"])
    length, opcode = struct.unpack_from("<II", init)
    assert (length, opcode) == (len(init), 26)
    assert os.statvfs(mount.mountpoint).f_bsize == 4096
    assert "SIGKILL" in mount.log()


def test_an_upgrade_does_not_count_as_a_restart(mount: Kept) -> None:
    pid = mount.launch()
    for number in range(MAX_RESTARTS + 2):
        os.kill(pid, signal.SIGUSR1)
        assert ended(mount.told[number]["pid"])
        assert (mount.mountpoint / "file").read_bytes() == HELLO
        assert mount.told[-1]["restarts"] == 0
        assert mount.told[-1]["init"]


def test_sigterm_unmounts(mount: Kept) -> None:
    pid = mount.launch()
    mount.kill(pid, signal.SIGTERM)
    assert mount.connection is None
    assert ended(mount.told[0]["pid"])
    assert not (mount.directory / PID_NAME).exists()
    assert list(mount.mountpoint.iterdir()) == []


def test_sigterm_with_an_open_file_ends_within_its_deadline(mount: Kept) -> None:
    pid = mount.launch(stop_deadline=0.1)
    file = os.open(mount.mountpoint / "file", os.O_RDONLY)
    mount.kill(pid, signal.SIGTERM)
    assert mount.connection is None
    with pytest.raises(OSError, match="not connected"):
        os.read(file, 10)
    with pytest.raises(OSError, match="not connected"):
        os.close(file)


def test_sigterm_with_a_reader_that_hangs(mount: Kept) -> None:
    mount.mode("hang")
    pid = mount.launch(stop_deadline=0.1)
    reading = os.open(mount.mountpoint / "file", os.O_RDONLY)
    child = os.fork()
    if child == 0:
        try:
            os.read(reading, 10)
        except OSError:
            os._exit(0)
        os._exit(1)
    mount.kill(pid, signal.SIGTERM)
    with pytest.raises(OSError, match="not connected"):
        os.close(reading)
    assert os.waitpid(child, 0)[1] == 0


def test_somebody_else_unmounts(mount: Kept) -> None:
    pid = mount.launch()
    fuse_mount.unmount(mount.mountpoint)
    assert ended(pid)
    assert not (mount.directory / PID_NAME).exists()


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("error: bucket nothing does not exist", "bucket nothing does not exist"),
        ("exit 3", "ended with status 3 before it was ready"),
        ("exit 0", "ended with status 0 before it was ready"),
        ("exit 75", "ended with status 75 before it was ready"),
    ],
)
def test_a_daemon_that_fails_at_the_start_is_the_reason(mount: Kept, mode: str, message: str) -> None:
    mount.mode(mode)
    with pytest.raises(MountError, match=message):
        mount.launch()
    assert mount.connection is None
    assert len(mount.told) == 1
    assert ended(mount.told[0]["pid"])
    assert find_keeper_by_directory(mount.directory) is None


def test_a_daemon_that_is_stuck_at_the_start(mount: Kept) -> None:
    mount.mode("stuck")
    with pytest.raises(MountError, match=r"not ready within 0\.2 s"):
        mount.launch(ready_deadline=0.2)
    assert mount.connection is None


def test_a_failed_start_can_be_tried_again(mount: Kept) -> None:
    mount.mode("error: no")
    with pytest.raises(MountError, match=r"^no$"):
        mount.launch()
    mount.mode("serve")
    mount.launch()
    assert (mount.mountpoint / "file").read_bytes() == HELLO


def test_restarts_have_an_end_and_leave_nothing(mount: Kept) -> None:
    pid = mount.launch()
    mount.mode("crash")
    mount.kill(mount.told[0]["pid"])
    assert ended(pid)
    assert mount.connection is None
    assert len(mount.told) == 1 + MAX_RESTARTS
    assert "giving up" in mount.log()


def test_a_daemon_that_is_stuck_after_a_restart_is_killed(mount: Kept) -> None:
    pid = mount.launch(ready_deadline=2.0)
    mount.mode("stuck")
    mount.kill(mount.told[0]["pid"])
    while len(mount.told) < 2:
        os.sched_yield()
    mount.mode("serve")
    assert (mount.mountpoint / "file").read_bytes() == HELLO
    assert len(mount.told) == 3
    assert find_keeper_by_directory(mount.directory) == pid


def test_without_the_keeper_the_daemon_ends(mount: Kept) -> None:
    pid = mount.launch()
    mount.kill(pid)
    assert ended(mount.told[0]["pid"])
    with pytest.raises(OSError, match="not connected"):
        os.statvfs(mount.mountpoint)
    assert find_keeper_by_directory(mount.directory) is None


def test_an_earlier_keeper_that_still_lives_is_waited_for(mount: Kept) -> None:
    first = mount.launch()
    with (mount.mountpoint / "file").open("rb"):
        fuse_mount.unmount(mount.mountpoint, lazy=True)
        assert find_keeper_by_directory(mount.directory) == first
    assert mount.launch() != first


def test_json_log(mount: Kept) -> None:
    mount.launch(mount.config(log_format="json", log_file=mount.work / "log.json"))
    (line,) = (mount.work / "log.json").read_text().splitlines()
    found = json.loads(line)
    assert list(found)[:4] == ["timestamp", "level", "logger", "event"]
    assert found["mountpoint"] == str(mount.mountpoint)


def test_of_two_keepers_of_one_number_the_youngest_is_found() -> None:
    number = 1 << 30  # of no connection there is
    words = [
        sys.executable,
        "-c",
        "import time; time.sleep(60)",
        KEEPER_MODULE,
        CONNECTION_OPTION,
    ]
    assert find_keeper_by_connection(number) is None
    with contextlib.ExitStack() as stack:
        pids = []
        for _ in range(3):
            process = stack.enter_context(subprocess.Popen([*words, str(number)]))
            stack.callback(process.kill)
            pids.append(process.pid)
            wait_until(lambda: find_keeper_by_connection(number) == pids[-1], "the youngest keeper", 10)
            time.sleep(0.05)  # longer than a clock tick, in which they are told apart
        os.kill(pids[-1], signal.SIGKILL)
        assert ended(pids[-1])
        assert find_keeper_by_connection(number) == pids[-2]
