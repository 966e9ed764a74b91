"""Every mountpoint that can't be mounted or unmounted: one line that says why and what to do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusecache.errors import ConfigError, FusecacheError, MountError
from fusecache_mount.lifecycle import fuse_mount, launch, unmount
from fusecache_mount.lifecycle.keeper_files import find_keeper_by_directory
from tests.support.kept import Kept, ended, is_keeper, kept
from tests.support.mounting import command, needs_fuse

pytestmark = needs_fuse
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do this")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Kept]:
    with kept(tmp_path) as made:
        yield made


def refused(mount: Kept, message: str, kind: type[FusecacheError] = MountError, **changes: object) -> None:
    with pytest.raises(kind, match=message) as caught:
        mount.launch(mount.config(**changes))
    assert "\n" not in str(caught.value)


# -- mounting


def test_missing(mount: Kept) -> None:
    path = mount.work / "missing"
    refused(mount, rf"does not exist: mkdir -p {re.escape(str(path))}", mountpoint=path)


def test_a_file(mount: Kept) -> None:
    path = mount.work / "file"
    path.touch()
    refused(mount, "is not a directory", mountpoint=path)
    refused(mount, "is not a directory", mountpoint=path / "below")


def test_not_empty(mount: Kept) -> None:
    (mount.mountpoint / "precious").touch()
    refused(mount, r"is not empty \(it holds 'precious'\).*-o nonempty")
    mount.launch(nonempty=True)
    assert not (mount.mountpoint / "precious").exists()
    fuse_mount.unmount(mount.mountpoint)
    assert (mount.mountpoint / "precious").exists()


def test_mounted_already(mount: Kept) -> None:
    mount.launch()
    refused(mount, "is already a fusecache mount of s3://bucket/prefix: fusecache umount .* first")


def test_mounted_already_by_another_name(mount: Kept) -> None:
    mount.launch()
    link = mount.work / "link"
    link.symlink_to(mount.mountpoint)
    refused(mount, "already a fusecache mount", mountpoint=link)
    refused(mount, "already a fusecache mount", mountpoint=mount.work / "cache" / ".." / "mnt")


def test_a_link_to_a_directory(mount: Kept) -> None:
    link = mount.work / "link"
    link.symlink_to(mount.mountpoint)
    mount.launch(mount.config(mountpoint=link))
    assert (link / "file").exists()
    unmount.unmount_and_wait(str(link), lazy=False, timeout=10)
    assert mount.connection is None


def test_stale(mount: Kept) -> None:
    mount.kill(mount.launch())
    assert ended(mount.told[0]["pid"])
    refused(mount, "is a stale mount, its daemon is gone: fusecache umount .*, then mount again")
    unmount.unmount_and_wait(str(mount.mountpoint), lazy=False, timeout=10)
    mount.launch()
    assert (mount.mountpoint / "file").exists()


def test_a_name_with_spaces_and_more(mount: Kept) -> None:
    path = mount.mountpoint = mount.work / "a b\tc\\d,e=f ü\n"
    path.mkdir()
    mount.launch()
    assert (path / "file").exists()
    unmount.unmount_and_wait(str(path), lazy=False, timeout=10)
    assert mount.connection is None


@pytest.mark.parametrize("key", ["cache_dir", "runtime_dir", "log_file"])
def test_own_files_inside_the_mountpoint(mount: Kept, key: str) -> None:
    link = mount.work / "elsewhere"
    link.symlink_to(mount.mountpoint)
    refused(mount, rf"{key} .* is inside the mountpoint", ConfigError, **{key: link / "x"})
    assert mount.connection is None


@pytest.mark.parametrize("where", ["", "mnt", "mnt/below"])
def test_a_source_that_would_wait_for_itself(mount: Kept, where: str) -> None:
    source = {"url": f"file://{mount.work}/{where}"}
    refused(mount, "lie in each other", ConfigError, sources=[source])
    assert mount.connection is None


def test_log_file_in_a_missing_directory(mount: Kept) -> None:
    refused(mount, "log_file .*No such file", ConfigError, log_file=mount.work / "no" / "log")
    assert mount.connection is None


@needs_root
def test_a_runtime_directory_of_somebody_else(mount: Kept) -> None:
    (mount.work / "run").mkdir()
    os.chown(mount.work / "run", 12345, 12345)
    refused(mount, "belongs to somebody else")
    assert mount.connection is None


@needs_root
def test_over_another_file_system(mount: Kept) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", mount.mountpoint], check=True)
    try:
        mount.launch()
        unmount.unmount_and_wait(str(mount.mountpoint), lazy=False, timeout=10)
        with pytest.raises(MountError, match="is a mount of type tmpfs, not of fusecache"):
            unmount.unmount_and_wait(str(mount.mountpoint), lazy=False, timeout=10)
    finally:
        subprocess.run(["umount", mount.mountpoint], check=True)


# -- unmounting


def test_not_mounted(mount: Kept) -> None:
    with pytest.raises(MountError, match=r"mnt is not mounted$"):
        unmount.unmount_and_wait(str(mount.mountpoint), lazy=False, timeout=10)
    with pytest.raises(MountError, match="does not exist"):
        unmount.unmount_and_wait(str(mount.work / "nothing"), lazy=False, timeout=10)


def test_unmounting_below_a_mount(mount: Kept) -> None:
    mount.launch()
    with pytest.raises(MountError, match="is not mounted: it lies in the mount"):
        unmount.unmount_and_wait(str(mount.mountpoint / "file"), lazy=False, timeout=10)


def test_unmounting_twice(mount: Kept) -> None:
    pid = mount.launch()
    unmount.unmount_and_wait(str(mount.mountpoint), lazy=False, timeout=10)
    assert find_keeper_by_directory(mount.directory) is None
    assert not is_keeper(pid)
    with pytest.raises(MountError, match="is not mounted"):
        unmount.unmount_and_wait(str(mount.mountpoint), lazy=False, timeout=10)


@pytest.mark.parametrize(
    "script",
    ["f = open('file', 'rb'); import os; os.chdir('/')", "pass"],
    ids=["an open file", "its current directory"],
)
def test_busy_names_who_it_is(mount: Kept, script: str) -> None:
    mount.launch()
    script += "\nprint('there', flush=True)\ninput()"
    with subprocess.Popen(
        ["python3", "-c", script], cwd=mount.mountpoint, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        with pytest.raises(MountError, match=rf"is busy: in use by python3 \({process.pid}\): .*--lazy"):
            unmount.unmount_and_wait(str(mount.mountpoint), lazy=False, timeout=0)
        assert (mount.mountpoint / "file").exists()
        process.communicate(b"\n")
    unmount.unmount_and_wait(str(mount.mountpoint), lazy=False, timeout=10)


def test_lazy_goes_on_for_open_files(mount: Kept) -> None:
    pid = mount.launch()
    process = subprocess.Popen(
        ["python3", "-c", "f = open('file', 'rb', 0); print('there', flush=True); input(); print(f.read())"],
        cwd=mount.mountpoint,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        unmount.unmount_and_wait(str(mount.mountpoint), lazy=True, timeout=10)
        assert mount.connection is None
        out, _ = process.communicate(b"\n")
    assert out == b"b'hello\\n'\n"
    assert ended(pid)


def test_stale_and_busy(mount: Kept) -> None:
    pid = mount.launch()
    reading = os.open(mount.mountpoint / "file", os.O_RDONLY)
    try:
        mount.kill(pid)
        assert ended(mount.told[0]["pid"])
        done = command("umount", str(mount.mountpoint), check=False)
        assert done.returncode == 1
        assert f"({os.getpid()})" in done.stderr
        assert done.stderr.count("\n") == 1
        unmount.unmount_and_wait(str(mount.mountpoint), lazy=True, timeout=10)
        assert mount.connection is None
    finally:
        with pytest.raises(OSError, match="not connected"):
            os.close(reading)


def test_a_daemon_that_hangs_does_not_keep_umount(mount: Kept) -> None:
    pid = mount.launch(stop_deadline=0.1)
    os.kill(mount.told[0]["pid"], signal.SIGSTOP)
    unmount.unmount_and_wait(str(mount.mountpoint), lazy=False, timeout=0.2)
    assert ended(pid)
    assert ended(mount.told[0]["pid"])


def test_source_names(mount: Kept) -> None:
    one = mount.config()
    assert launch.mount_table_source(one) == "s3://bucket/prefix"
    two = mount.config(sources=[{"name": "a", "url": "s3://a"}, {"name": "b", "url": "s3://b"}])
    assert launch.mount_table_source(two) == "fusecache"
