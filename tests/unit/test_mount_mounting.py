"""Mounting without mounting: mountinfo, arguments of mount(8) and mount.fuse, the command line's own words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusecache.cli import mounting as cli_mounting
from fusecache.control import mountinfo as mountinfo_module
from fusecache.control.memfd import make_sealed_memfd
from fusecache.errors import MountError
from fusecache_mount.kernel import syscalls
from fusecache_mount.lifecycle import fuse_mount, helper, mounting

_MOUNTINFO = r"""
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 0:40 / /models rw - fuse.fusecache s3://models ro,user_id=0
41 22 0:41 / /with\040space\134and\011tab ro shared:7 master:1 - fuse.fusecache s3://b ro
42 22 0:42 / /covered ro - fuse.fusecache s3://b ro
43 42 0:43 / /covered rw - tmpfs tmpfs rw
44 43 0:44 / /twice rw - tmpfs tmpfs rw
45 44 0:45 / /twice rw - fuse.fusecache s3://c ro
junk
""".strip()


@pytest.fixture
def mountinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mountinfo"
    path.write_text(_MOUNTINFO)
    found = mountinfo_module.read_mountinfo(path)
    monkeypatch.setattr(mountinfo_module, "read_mountinfo", lambda path: found)


@pytest.mark.usefixtures("mountinfo")
@pytest.mark.parametrize(
    ("mountpoint", "device"),
    [
        ("/models", "0:40"),
        ("/with space\\and\ttab", "0:41"),
        ("/covered", None),
        ("/twice", "0:45"),
        ("/", None),
        ("/missing", None),
    ],
)
def test_the_mount_on_top(mountpoint: str, device: str | None) -> None:
    assert fuse_mount.device_number_of(mountpoint) == device
    assert fuse_mount.is_mounted(mountpoint) is (device is not None)


@pytest.mark.usefixtures("mountinfo")
def test_another_mount_at_the_same_place() -> None:
    assert fuse_mount.is_mounted("/models", 40)
    assert not fuse_mount.is_mounted("/models", 41)


@pytest.mark.parametrize(
    ("arguments", "made"),
    [
        (["s3://b/p", "/m"], ["--", "s3://b/p", "/m"]),
        (["s3://b/p", "/m", "-o", "rw,a=1"], ["-o", "rw,a=1", "--", "s3://b/p", "/m"]),
        (["-n", "-o", "ro", "s3://b", "/m", "-v"], ["-o", "ro", "--", "s3://b", "/m"]),
        (
            ["none", "/m", "-nsvoconfig=/f,ro", "-t", "fuse.fusecache"],
            ["-o", "config=/f,ro", "--", "none", "/m"],
        ),
        (["a", "/m", "-o", "x", "-o", "y"], ["-o", "x", "-o", "y", "--", "a", "/m"]),
        (["a", "/m", "-N", "/proc/1/ns/mnt"], ["--", "a", "/m"]),
    ],
)
def test_arguments_of_mount8(arguments: list[str], made: list[str]) -> None:
    assert helper.translate_arguments(arguments) == (["mount", "--mount8", *made], True)


def test_a_fake_mount_does_nothing() -> None:
    assert helper.main(["s3://b", "/m", "-f"]) == 0


@pytest.mark.parametrize(
    "arguments", [[], ["s3://b"], ["a", "/m", "more"], ["a", "/m", "-o"], ["a", "/m", "-q"]]
)
def test_wrong_arguments_of_mount8(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert helper.main(arguments) == helper.EXIT_USAGE
    said = capsys.readouterr().err
    assert said.startswith("fusecache: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "is_call"),
    [
        (["s3://b/p", "/models", "-o", "rw,dev,suid"], True),
        (["s3://b/p", "/models"], True),
        (["/srv/models", "/models", "-o", "ro"], True),
        (["none", "/models", "-o", "rw,config=/etc/f.toml"], True),
        (["fusecache", "/models", "-o", "config=/etc/f.toml"], True),
        (["none", "/models"], False),
        (["mount", "s3://b", "/m"], False),
        (["status", "/models"], False),
        (["ls", "/models", "-o"], False),
        (["--version"], False),
        (["s3://b/p", "--help"], False),
        (["s3://b/p"], False),
        ([], False),
    ],
)
def test_calls_of_mount_fuse(arguments: list[str], is_call: bool) -> None:
    assert cli_mounting.is_mount_fuse_call(arguments) is is_call


def test_a_memfd_is_sealed() -> None:
    fd = make_sealed_memfd("test", b"secret")
    try:
        with pytest.raises(PermissionError):
            os.write(fd, b"x")
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        assert not os.get_inheritable(fd)
        assert os.read(fd, 100) == b"secret"
    finally:
        os.close(fd)


def test_read_ahead_of_what_is_not_mounted(tmp_path: Path) -> None:
    with pytest.raises(MountError, match="is not mounted"):
        mounting.set_read_ahead(tmp_path, 1 << 20)


def test_aborting_what_is_not_there() -> None:
    assert fuse_mount.abort_connection(999_999_999) is False


def test_unmounting_what_is_not_mounted(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=str(tmp_path)):
        fuse_mount.unmount(tmp_path)


def test_no_fuse_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "FUSE_DEVICE", str(tmp_path / "fuse"))
    with pytest.raises(MountError, match=r"fuse is missing: modprobe fuse .* --device"):
        mounting.mount("s3://b", tmp_path, allow_other=False)
    assert mounting.clone_devices(0, 3) == []


def test_no_privilege_and_no_fusermount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(mounting, "_mount_directly", refuse)
    monkeypatch.setattr(mounting, "find_fusermount", lambda: None)
    with pytest.raises(MountError, match=r"needs root .* or fusermount3: apt-get install fuse3"):
        mounting.mount("s3://b", tmp_path, allow_other=False)


def test_what_fusermount_says_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "fusermount3"
    program.write_text("#!/bin/sh\necho 'fusermount3: option allow_other only allowed if ...' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(mounting, "find_fusermount", lambda: str(program))
    with pytest.raises(MountError, match=r"denied, and fusermount3 says: option allow_other only allowed"):
        mounting._mount_by_fusermount("s3://b", tmp_path, True, "denied")


def test_the_keeper_imports_the_standard_library_only() -> None:
    """It is resident beside every daemon, and must not fail with them."""
    script = "import sys; before = set(sys.modules); import fusecache_mount.lifecycle.keeper as keeper"
    script += "; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    foreign = {name for name in loaded if name.split(".")[0] not in sys.stdlib_module_names}
    packages = {"fusecache", "fusecache.control", "fusecache_mount", "fusecache_mount.kernel"}
    assert foreign - packages == {
        "fusecache.control.mountinfo",
        "fusecache_mount.kernel.syscalls",
        "fusecache_mount.lifecycle",
        *(
            f"fusecache_mount.lifecycle.{name}"
            for name in (
                "daemon_process",
                "fuse_mount",
                "keeper",
                "keeper_files",
                "keeper_protocol",
                "restart_policy",
            )
        ),
    }
