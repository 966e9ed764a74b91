"""POSIX on a real mount: names, attributes, directories, access, and that nothing can be changed."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.content import content
from tests.support.faulty import FaultyServer
from tests.support.mounting import RealMount, failing, mounted, needs_fuse, s3_environment
from tests.support.servers import S3Bucket, S3Server

pytestmark = needs_fuse

_SHARD = 2_500_001
_LONG = "n" * 255
_UNUSUAL = (
    "a b",
    "ünï ☃",
    _LONG,
    "line\nbreak",
    "-dash",
    "..dots",
    "quote'\"",
    "percent%20",
    "plus+",
    "#?&=",
)


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> S3Bucket:
    """A small model and names of all kinds, on SeaweedFS."""
    made = s3_server.bucket()
    made.put("model/shard", content("model/shard", 1, 0, _SHARD))
    made.put("model/config.json", b"{}")
    made.put("model/empty", b"")
    for name in _UNUSUAL:
        made.put(f"names/{name}", name.encode())
    return made


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[FaultyServer]:
    """Counts the requests."""
    with FaultyServer(s3_server.endpoint) as server:
        yield server


@pytest.fixture(scope="module")
def mount(
    bucket: S3Bucket, proxy: FaultyServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealMount]:
    """The bucket, mounted with attributes that are none of the defaults."""
    env = s3_environment(bucket.server, proxy.url)
    work = tmp_path_factory.mktemp("posix")
    with mounted(
        bucket.url,
        work,
        env=env,
        uid=1234,
        gid=2345,
        umask="027",
        file_mode="0664",
        dir_mode="0775",
        allow_other="true",
    ) as made:
        yield made


@pytest.fixture
def path(mount: RealMount) -> Path:
    """The mountpoint."""
    return mount.path


def test_attributes(path: Path) -> None:
    file, directory = (path / "model/shard").stat(), (path / "model").stat()
    assert stat.S_IMODE(file.st_mode) == 0o640
    assert stat.S_IMODE(directory.st_mode) == 0o750
    assert stat.S_ISREG(file.st_mode)
    assert stat.S_ISDIR(directory.st_mode)
    for found in (file, directory, path.stat()):
        assert (found.st_uid, found.st_gid, found.st_blksize) == (1234, 2345, 4096)
    assert (file.st_size, file.st_blocks, file.st_nlink) == (_SHARD, -(-_SHARD // 512), 1)
    assert directory.st_nlink == 2
    assert (path / "model/empty").stat().st_size == 0
    assert (path / "model/empty").read_bytes() == b""
    assert file.st_mtime > 1_700_000_000
    assert file.st_dev == directory.st_dev


def test_the_bytes_are_those_of_the_object(path: Path) -> None:
    assert (path / "model/shard").read_bytes() == content("model/shard", 1, 0, _SHARD)


def test_an_inode_number_stays_while_a_file_becomes_complete(path: Path) -> None:
    before = (path / "model/shard").stat()
    (path / "model/shard").read_bytes()
    with open(path / "model/shard", "rb") as file:
        assert os.fstat(file.fileno()).st_ino == before.st_ino
    assert (path / "model/shard").stat().st_ino == before.st_ino
    assert {entry.inode() for entry in os.scandir(path / "model") if entry.name == "shard"} == {before.st_ino}


def test_unusual_names(path: Path) -> None:
    assert sorted(os.listdir(path / "names")) == sorted(_UNUSUAL)
    for name in _UNUSUAL:
        assert (path / "names" / name).read_bytes() == name.encode()
    assert failing(lambda: os.stat(path / (_LONG + "n"))) == "ENAMETOOLONG"


def test_directories_have_attributes_dot_and_dotdot(path: Path) -> None:
    with os.scandir(path / "model") as found:
        entries = {entry.name: entry for entry in found}
    assert set(entries) == {"shard", "config.json", "empty"}
    assert all(entry.is_file(follow_symlinks=False) for entry in entries.values())
    assert entries["shard"].inode() == (path / "model/shard").stat().st_ino
    listed = subprocess.run(
        ["ls", "-a", path / "model"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {".", ".."} < set(listed)
    assert (path / "model/..").stat().st_ino == path.stat().st_ino
    assert (path / "model/.").stat().st_ino == (path / "model").stat().st_ino


def test_a_descriptor_of_a_directory_works(path: Path) -> None:
    directory = os.open(path / "model", os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert set(os.listdir(directory)) == {"shard", "config.json", "empty"}
        assert os.stat("config.json", dir_fd=directory).st_size == 2
        os.fsync(directory)
    finally:
        os.close(directory)
    assert failing(lambda: os.open(path / "model/shard", os.O_RDONLY | os.O_DIRECTORY)) == "ENOTDIR"


def test_names_that_do_not_exist_cost_no_request(path: Path, proxy: FaultyServer) -> None:
    os.listdir(path)
    before = proxy.counts()
    for number in range(50):
        assert not (path / f"model/probe-{number}").exists()
        assert not (path / f"nowhere/{number}").exists()
        os.listdir(path / "model")
    assert proxy.counts() == before


def test_statfs(path: Path) -> None:
    found = os.statvfs(path / "model/shard")
    assert (found.f_bsize, found.f_frsize, found.f_namemax) == (4096, 4096, 255)
    assert found.f_blocks == (1 << 30) // 4096
    assert 0 < found.f_bavail <= found.f_bfree <= found.f_blocks
    assert found.f_files >= 13


def test_access_goes_by_mode(path: Path) -> None:
    file = path / "model/shard"
    assert os.access(file, os.R_OK)
    assert not os.access(file, os.X_OK)
    assert os.access(path / "model", os.R_OK | os.X_OK)
    assert not os.access(file, os.W_OK)
    assert not os.access(path, os.W_OK)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become other users")
@pytest.mark.parametrize(
    ("uid", "gid", "allowed"),
    [(1234, 1, True), (1, 2345, True), (1, 1, False)],
    ids=["owner", "group", "other"],
)
def test_other_users_get_what_the_mode_says(path: Path, uid: int, gid: int, allowed: bool) -> None:
    done = subprocess.run(
        ["cat", "model/config.json"],
        cwd=path,
        user=uid,
        group=gid,
        extra_groups=[],
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) is allowed, done.stderr
    if not allowed:
        assert "Permission denied" in done.stderr


def test_extended_attributes(path: Path, bucket: S3Bucket) -> None:
    file = path / "model/config.json"
    file.read_bytes()
    values = {
        name.removeprefix("user.fusecache."): os.getxattr(file, name).decode() for name in os.listxattr(file)
    }
    assert set(values) == {"etag", "version", "cached_bytes", "source"}
    assert values["etag"].strip('"') == bucket.client.head_object(
        Bucket=bucket.name, Key="model/config.json"
    )["ETag"].strip('"')
    assert len(values["version"]) == 32
    assert values["cached_bytes"] == "2"
    assert values["source"].startswith(bucket.url)
    assert failing(lambda: os.getxattr(file, "user.other")) == "ENODATA"
    assert failing(lambda: os.getxattr(path / "model", "user.fusecache.etag")) == "ENODATA"


def _fallocate(path: Path) -> None:
    with open(path / "model/shard", "rb") as file:
        os.posix_fallocate(file.fileno(), 0, 10)


def _write(path: Path) -> None:
    with open(path / "model/shard", "rb") as file:
        os.write(file.fileno(), b"x")


def _opened(path: Path, name: str, flags: int) -> None:
    os.close(os.open(path / name, flags, 0o644))


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "open O_WRONLY": ("EROFS", lambda at: _opened(at, "model/shard", os.O_WRONLY)),
    "open O_RDWR": ("EROFS", lambda at: _opened(at, "model/shard", os.O_RDWR)),
    "open O_TRUNC": ("EROFS", lambda at: _opened(at, "model/shard", os.O_RDONLY | os.O_TRUNC)),
    "open O_APPEND": ("EROFS", lambda at: _opened(at, "model/shard", os.O_WRONLY | os.O_APPEND)),
    "create": ("EROFS", lambda at: _opened(at, "model/new", os.O_WRONLY | os.O_CREAT)),
    "create O_EXCL": ("EROFS", lambda at: _opened(at, "model/new", os.O_WRONLY | os.O_CREAT | os.O_EXCL)),
    "O_TMPFILE": ("EROFS EOPNOTSUPP", lambda at: _opened(at, "model", os.O_RDWR | os.O_TMPFILE)),
    "mkdir": ("EROFS", lambda at: os.mkdir(at / "new")),
    "rmdir": ("EROFS", lambda at: os.rmdir(at / "model")),
    "unlink": ("EROFS", lambda at: os.unlink(at / "model/shard")),
    "rename": ("EROFS", lambda at: os.rename(at / "model/shard", at / "model/other")),
    "link": ("EROFS", lambda at: os.link(at / "model/shard", at / "model/other")),
    "symlink": ("EROFS", lambda at: os.symlink("shard", at / "model/other")),
    "mknod": ("EROFS", lambda at: os.mknod(at / "model/other", stat.S_IFREG | 0o644)),
    "mkfifo": ("EROFS", lambda at: os.mkfifo(at / "model/other")),
    "chmod": ("EROFS", lambda at: os.chmod(at / "model/shard", 0o600)),
    "chown": ("EROFS", lambda at: os.chown(at / "model/shard", 0, 0)),
    "utimes": ("EROFS", lambda at: os.utime(at / "model/shard", (1, 1))),
    "touch": ("EROFS", lambda at: os.utime(at / "model/shard")),
    "truncate": ("EROFS", lambda at: os.truncate(at / "model/shard", 1)),
    "setxattr": ("EROFS", lambda at: os.setxattr(at / "model/shard", "user.a", b"b")),
    "setxattr ours": ("EROFS", lambda at: os.setxattr(at / "model/shard", "user.fusecache.etag", b"b")),
    "removexattr": ("EROFS", lambda at: os.removexattr(at / "model/shard", "user.fusecache.etag")),
    "fallocate": ("EBADF", _fallocate),
    "write": ("EBADF", _write),
}


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_can_be_changed(name: str, path: Path) -> None:
    expected, call = CHANGES[name]
    before = sorted(os.listdir(path / "model"))
    assert failing(lambda: call(path)) in expected.split()
    assert sorted(os.listdir(path / "model")) == before
    assert (path / "model/shard").stat().st_size == _SHARD


def test_what_is_not_a_read_has_its_own_error(path: Path) -> None:
    with open(path / "model/shard", "rb") as file:
        assert failing(lambda: fcntl.ioctl(file.fileno(), 0x1234)) == "ENOTTY"
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        fcntl.flock(file, fcntl.LOCK_SH)
    assert failing(lambda: os.readlink(path / "model/shard")) == "EINVAL"
    assert failing(lambda: os.open(path / "model/shard", os.O_RDONLY | os.O_CREAT | os.O_EXCL)) in (
        "EEXIST",
        "EROFS",
    )
    assert failing(lambda: (path / "model/shard/below").stat()) == "ENOTDIR"


def test_the_mount_says_what_it_is(path: Path) -> None:
    line = next(each for each in Path("/proc/self/mountinfo").read_text().splitlines() if f" {path} " in each)
    before, _, after = line.partition(" - ")
    assert after.split()[0] == "fuse.fusecache"
    assert "ro" in before.split()[5].split(",")
    assert after.split()[1].startswith("s3://")
