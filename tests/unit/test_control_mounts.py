"""Finding our mounts in mountinfo, and their runtime directories."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from fusecache.control import mounts
from fusecache.errors import MountError

MOUNTINFO = r"""27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
40 27 0:53 / /models ro,nosuid shared:3 - fuse.fusecache s3://models ro,user_id=0,group_id=0,allow_other
41 27 0:54 / /my\040models\134x\012y ro - fuse.fusecache gs://b/a\040b ro,user_id=1000,group_id=0
42 27 0:55 / /other rw - fuse.rclone remote: rw,user_id=0
43 27 0:56 / /under ro - fuse.fusecache s3://hidden ro,user_id=0
44 43 0:57 / /under rw - tmpfs tmpfs rw
nonsense
45 27 0:58 / /short ro -
"""


@pytest.fixture
def mountinfo(tmp_path: Path) -> Path:
    file = tmp_path / "mountinfo"
    file.write_text(MOUNTINFO)
    return file


def test_only_our_mounts_that_are_on_top(mountinfo: Path) -> None:
    assert mounts.list_mounts(mountinfo) == [
        mounts.Mount(Path("/models"), "s3://models", "0:53", 0),
        mounts.Mount(Path("/my models\\x\ny"), "gs://b/a b", "0:54", 1000),
    ]


def test_find_by_path(mountinfo: Path, tmp_path: Path) -> None:
    found = mounts.find_mount("/models/../models/", mountinfo)
    assert found is not None
    assert found.source == "s3://models"
    assert mounts.find_mount("/other", mountinfo) is None
    assert mounts.find_mount("/models/llama", mountinfo) is None
    (tmp_path / "link").symlink_to("/models")
    linked = mounts.find_mount(tmp_path / "link", mountinfo)
    assert linked is not None
    assert linked.mountpoint == Path("/models")


def test_find_the_mount_around_a_path(mountinfo: Path) -> None:
    found = mounts.find_containing_mount("/models/llama/config.json", mountinfo)
    assert found is not None
    assert (found[0].mountpoint, found[1]) == (Path("/models"), "llama/config.json")
    at_root = mounts.find_containing_mount("/models", mountinfo)
    assert at_root is not None
    assert at_root[1] == ""
    assert mounts.find_containing_mount("/other/file", mountinfo) is None


def test_mount_id_is_stable() -> None:
    assert mounts.compute_mount_id(Path("/models")) == "580b55c78e327874"


def test_find_socket_prefers_what_exists(tmp_path: Path) -> None:
    mount = mounts.Mount(Path("/models"), "s3://models", "0:53", 0)
    env = {"FUSECACHE_RUNTIME_DIR": str(tmp_path)}
    wanted = mounts.control_socket_path(tmp_path, mount.mountpoint)
    assert mounts.find_control_socket(mount, tmp_path / "default", env) == wanted
    wanted.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(wanted))
    assert mounts.find_control_socket(mount, tmp_path / "default", env) == wanted


def test_a_socket_of_a_stranger_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = mounts.Mount(Path("/models"), "s3://models", "0:53", 1234)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for directory in (ours, theirs):
        mounts.control_socket_path(directory, mount.mountpoint).parent.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(mounts.control_socket_path(directory, mount.mountpoint)))
    foreign = mounts.control_socket_path(theirs, mount.mountpoint)
    real = Path.lstat

    def lstat(path: Path) -> os.stat_result:
        found = real(path)
        return os.stat_result((*found[:4], 5678, *found[5:10])) if path == foreign else found

    monkeypatch.setattr(Path, "lstat", lstat)
    found = mounts.find_control_socket(mount, ours, {"FUSECACHE_RUNTIME_DIR": str(theirs)})
    assert found == mounts.control_socket_path(ours, mount.mountpoint)


def test_the_runtime_folder_is_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = mounts.make_mount_runtime_dir(tmp_path / "a" / "run", Path("/models"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700
    made.chmod(0o777)
    mounts.make_mount_runtime_dir(tmp_path / "a" / "run", Path("/models"))
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_a_runtime_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MountError, match="runtime_dir"):
        mounts.make_mount_runtime_dir(tmp_path / "file", Path("/models"))
