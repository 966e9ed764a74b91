"""The FUSE operations called directly: attributes, names, errors, and that nothing can be changed."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pyfuse3
import pytest
import trio
from pyfuse3 import FUSEError

from fusecache import errors
from fusecache.catalog.catalog import Catalog
from fusecache.catalog.entry import ROOT
from fusecache.events import EventHub
from fusecache.types import ObjectVersion
from fusecache_mount.fs.operations import AttributePolicy, Operations
from fusecache_mount.kernel.errnos import WrongNodeidError, errno_of
from fusecache_mount.kernel.nodeids import passthrough_nodeid
from tests.support.objects import Hand, Objects


class Context:
    """The process that asks."""

    def __init__(self, uid: int = 0, gid: int = 0) -> None:
        self.uid, self.gid, self.umask = uid, gid, 0
        self.pid = os.getpid()


def context(uid: int = 0, gid: int = 0) -> Any:
    return Context(uid, gid)


class RecordingOpenFiles:
    """Open files that remember what was asked of them."""

    def __init__(self) -> None:
        self.passthrough_keys: set[str] = set()
        self.opened: list[int] = []
        self.released: list[int] = []
        self.error: Exception | None = None
        self.space = (40 << 20, 100 << 20)
        self.stale_answers: list[tuple[str | None, int]] = []

    def record_stale_answer(self, path: str | None, tid: int) -> None:
        self.stale_answers.append((path, tid))

    def resolves_to_passthrough(self, version: ObjectVersion) -> bool:
        return version.key in self.passthrough_keys

    async def open(self, nodeid: int, tid: int) -> None:
        if self.error is not None:
            raise self.error
        self.opened.append(nodeid)

    def release(self, nodeid: int) -> None:
        self.released.append(nodeid)

    async def read(self, nodeid: int, offset: int, size: int) -> bytes:
        if self.error is not None:
            raise self.error
        return b"0123456789"[offset : offset + size]

    def cached_bytes(self, nodeid: int, version: ObjectVersion) -> int:
        return 7

    def cache_usage(self) -> tuple[int, int]:
        return self.space


class Mounted:
    """Operations over objects in memory."""

    def __init__(self, **policy: Any) -> None:
        self.objects = Objects()
        self.files = RecordingOpenFiles()
        self.hand = Hand()
        self.policy = AttributePolicy(**{"uid": 1000, "gid": 100, "negative_timeout": 30.0} | policy)

    async def start(self) -> None:
        self.catalog = Catalog(
            [self.objects.source()], ttl=60, snapshot_dir=None, events=EventHub(), clock=self.hand
        )
        await self.catalog.listings.start()
        self.operations = Operations(self.catalog, cast(Any, self.files), self.policy)

    async def lookup(self, path: str) -> pyfuse3.EntryAttributes:
        found = await self.operations.getattr(ROOT, context())
        for name in path.split("/"):
            found = await self.operations.lookup(found.st_ino, name.encode(), context())
        return found


async def mounted(*keys: str, **policy: Any) -> Mounted:
    made = Mounted(**policy)
    for key in keys:
        made.objects.put(key, 10_000)
    await made.start()
    return made


async def number_of(work: Awaitable[object]) -> int:
    with pytest.raises(FUSEError) as caught:
        await work
    return caught.value.errno


async def test_attributes_are_ours_and_not_the_uploaders() -> None:
    made = await mounted("d/a", file_mode=0o644, dir_mode=0o755, umask=0o027)
    file, directory = await made.lookup("d/a"), await made.lookup("d")
    assert file.st_mode == stat.S_IFREG | 0o640
    assert directory.st_mode == stat.S_IFDIR | 0o750
    assert (file.st_uid, file.st_gid, directory.st_uid, directory.st_gid) == (1000, 100, 1000, 100)
    assert (file.st_size, file.st_blocks, file.st_blksize, file.st_nlink) == (10_000, 20, 4096, 1)
    assert (directory.st_size, directory.st_blocks, directory.st_blksize, directory.st_nlink) == (
        4096,
        8,
        4096,
        2,
    )
    assert file.st_mtime_ns == file.st_ctime_ns == file.st_atime_ns == 1_000_000_000
    again = await made.operations.getattr(file.st_ino, context())
    assert again.__getstate__() == file.__getstate__()


async def test_timeouts_end_with_the_listing() -> None:
    made = await mounted("d/a", attr_timeout=600.0)
    made.hand.now += 20
    file, directory = await made.lookup("d/a"), await made.lookup("d")
    assert (file.entry_timeout, file.attr_timeout) == (40, 600)
    assert (directory.entry_timeout, directory.attr_timeout) == (40, 40)


async def test_a_name_that_does_not_exist_is_an_answer_to_keep() -> None:
    made = await mounted("a")
    absent = await made.lookup("b")
    assert absent.st_ino == 0
    assert absent.entry_timeout == 30
    long = made.operations.lookup(ROOT, b"n" * 256, context())
    assert await number_of(long) == errno.ENAMETOOLONG


async def test_dot_and_dotdot_can_be_looked_up() -> None:
    made = await mounted("d/e/a")
    directory, below = await made.lookup("d"), await made.lookup("d/e")
    assert (await made.operations.lookup(below.st_ino, b".", context())).st_ino == below.st_ino
    assert (await made.operations.lookup(below.st_ino, b"..", context())).st_ino == directory.st_ino
    assert (await made.operations.lookup(ROOT, b"..", context())).st_ino == ROOT


async def test_a_complete_file_is_reached_by_its_passthrough_nodeid() -> None:
    made = await mounted("a", "b")
    base = (await made.lookup("a")).st_ino
    made.files.passthrough_keys.add("a")
    passthrough = (await made.lookup("a")).st_ino
    assert passthrough == passthrough_nodeid(base)
    assert (await made.operations.getattr(passthrough, context())).st_ino == passthrough
    opened = await made.operations.open(passthrough, os.O_RDONLY, context())
    assert opened.fh == passthrough
    assert made.files.opened == [passthrough]
    await made.operations.release(opened.fh)
    assert made.files.released == [passthrough]


async def test_open_keeps_the_page_cache_of_an_immutable_version() -> None:
    made = await mounted("a")
    number = (await made.lookup("a")).st_ino
    opened = await made.operations.open(number, os.O_RDONLY | os.O_DIRECT | os.O_NONBLOCK, context())
    assert (opened.fh, opened.keep_cache, opened.direct_io) == (number, True, False)
    assert bytes(await made.operations.read(opened.fh, 4, 3)) == b"456"
    with pytest.raises(FUSEError) as caught:
        await made.operations.flush(opened.fh)
    assert caught.value.errno == errno.ENOSYS  # once: then the kernel leaves it out
    await made.operations.fsync(opened.fh, True)


async def test_errors_of_the_files_have_their_numbers() -> None:
    made = await mounted("d/a")
    number = (await made.lookup("d/a")).st_ino
    directory = (await made.lookup("d")).st_ino
    for error, expected in (
        (errors.UnavailableError("down"), errno.EIO),
        (errors.VersionChangedError("new"), errno.ESTALE),
        (errors.AccessDeniedError("no"), errno.EACCES),
        (RuntimeError("unforeseen"), errno.EIO),
    ):
        made.files.error = error
        assert await number_of(made.operations.open(number, os.O_RDONLY, context())) == expected
        assert await number_of(made.operations.read(number, 0, 1)) == expected
    assert await number_of(made.operations.open(directory, os.O_RDONLY, context())) == errno.EISDIR
    assert await number_of(made.operations.opendir(number, context())) == errno.ENOTDIR
    assert await number_of(made.operations.readlink(number, context())) == errno.EINVAL
    for work in (made.operations.getattr(99, context()), made.operations.opendir(99, context())):
        assert await number_of(work) == errno.ESTALE


def test_every_error_has_its_number() -> None:
    expected = {
        errors.NotFoundError: errno.ENOENT,
        errors.AccessDeniedError: errno.EACCES,
        errors.VersionChangedError: errno.ESTALE,
        errors.AttestationError: errno.EBADMSG,
        errors.CancelledReadError: errno.EINTR,
        WrongNodeidError: errno.ESTALE,
    }

    def below(kind: type[Exception]) -> list[type[Exception]]:
        return [kind] + [each for child in kind.__subclasses__() for each in below(child)]

    for kind in [*below(errors.FusecacheError), OSError, ValueError]:
        assert errno_of(kind("one line")) == expected.get(cast(Any, kind), errno.EIO)


async def test_another_version_is_another_file_and_the_old_handle_goes_on() -> None:
    made = await mounted("a")
    old = await made.lookup("a")
    made.objects.put("a", 20_000)
    await made.catalog.listings.refresh()
    new = await made.lookup("a")
    assert new.st_ino != old.st_ino
    assert new.st_size == 20_000
    assert (await made.operations.getattr(old.st_ino, context())).st_size == 10_000
    # the VFS looks the path up again on ESTALE, and opens the new version
    assert await number_of(made.operations.open(old.st_ino, os.O_RDONLY, context())) == errno.ESTALE
    assert made.files.stale_answers == [("a", os.getpid())]
    assert bytes(await made.operations.read(old.st_ino, 0, 2)) == b"01"
    await made.operations.forget([(old.st_ino, 1)])
    assert await number_of(made.operations.getattr(old.st_ino, context())) == errno.ESTALE


async def test_a_forgotten_passthrough_nodeid_is_the_same_entry() -> None:
    made = await mounted("a")
    base = (await made.lookup("a")).st_ino
    made.files.passthrough_keys.add("a")
    passthrough = (await made.lookup("a")).st_ino
    made.objects.delete("a")
    await made.catalog.listings.refresh()
    await made.operations.forget([(base, 1)])
    assert (await made.operations.getattr(passthrough, context())).st_size == 10_000
    await made.operations.forget([(passthrough, 1)])
    assert await number_of(made.operations.getattr(base, context())) == errno.ESTALE


@pytest.mark.parametrize(
    ("who", "mask", "allowed"),
    [
        ((0, 0), os.R_OK, True),
        ((0, 0), os.X_OK, False),
        ((1000, 5), os.R_OK, True),
        ((1000, 5), os.X_OK, False),
        ((5, 100), os.R_OK, True),
        ((5, 5), os.R_OK, False),
        ((5, 5), os.F_OK, True),
    ],
)
async def test_access_is_granted_by_mode(who: tuple[int, int], mask: int, allowed: bool) -> None:
    made = await mounted("d/a", file_mode=0o440, dir_mode=0o550)
    file = (await made.lookup("d/a")).st_ino
    assert await made.operations.access(file, mask, context(*who)) is allowed
    directory = (await made.lookup("d")).st_ino
    assert await made.operations.access(directory, os.X_OK, context()) is True
    assert await number_of(made.operations.access(file, os.W_OK, context(*who))) == errno.EROFS


async def test_statfs_is_the_cache_and_never_zero() -> None:
    made = await mounted("a")
    found = await made.operations.statfs(context())
    assert (found.f_bsize, found.f_frsize, found.f_namemax) == (4096, 4096, 255)
    assert (found.f_blocks, found.f_bfree, found.f_bavail) == (25_600, 15_360, 15_360)
    made.files.space = (10, 0)
    found = await made.operations.statfs(context())
    assert (found.f_blocks, found.f_bfree) == (1, 0)


async def test_extended_attributes() -> None:
    made = await mounted("d/a")
    file, directory = (await made.lookup("d/a")).st_ino, (await made.lookup("d")).st_ino
    version = made.objects.versions["d/a"]
    names = await made.operations.listxattr(file, context())
    values = {name: await made.operations.getxattr(file, name, context()) for name in names}
    assert values == {
        b"user.fusecache.etag": version.etag.encode(),
        b"user.fusecache.version": version.id.encode(),
        b"user.fusecache.cached_bytes": b"7",
        b"user.fusecache.source": b"memory://bucket",
    }
    assert await made.operations.listxattr(directory, context()) == [b"user.fusecache.source"]
    for number, name in (
        (file, b"user.other"),
        (file, b"security.capability"),
        (directory, b"user.fusecache.etag"),
    ):
        assert await number_of(made.operations.getxattr(number, name, context())) == errno.ENODATA


Change = Callable[[Operations, int, int], Awaitable[object]]
CHANGES: dict[str, Change] = {
    "open O_WRONLY": lambda do, file, directory: do.open(file, os.O_WRONLY, context()),
    "open O_RDWR": lambda do, file, directory: do.open(file, os.O_RDWR, context()),
    "open O_TRUNC": lambda do, file, directory: do.open(file, os.O_TRUNC, context()),
    "create": lambda do, file, directory: do.create(directory, b"n", 0o644, os.O_CREAT, context()),
    "write": lambda do, file, directory: do.write(file, 0, b"x"),
    "setattr": lambda do, file, directory: do.setattr(
        file, pyfuse3.EntryAttributes(), cast(Any, None), None, context()
    ),
    "mkdir": lambda do, file, directory: do.mkdir(directory, b"n", 0o755, context()),
    "mknod": lambda do, file, directory: do.mknod(directory, b"n", 0o644, 0, context()),
    "symlink": lambda do, file, directory: do.symlink(directory, b"n", b"a", context()),
    "link": lambda do, file, directory: do.link(file, directory, b"n", context()),
    "unlink": lambda do, file, directory: do.unlink(directory, b"a", context()),
    "rmdir": lambda do, file, directory: do.rmdir(directory, b"d", context()),
    "rename": lambda do, file, directory: do.rename(directory, b"a", directory, b"b", 0, context()),
    "setxattr": lambda do, file, directory: do.setxattr(file, b"user.a", b"b", context()),
    "removexattr": lambda do, file, directory: do.removexattr(file, b"user.fusecache.etag", context()),
}


@pytest.mark.parametrize("name", CHANGES)
async def test_nothing_can_be_changed(name: str) -> None:
    made = await mounted("d/a")
    file, directory = (await made.lookup("d/a")).st_ino, (await made.lookup("d")).st_ino
    assert await number_of(CHANGES[name](made.operations, file, directory)) == errno.EROFS
    assert made.files.opened == []


class Dirent:
    """The entries of a readdir reply, and how many more fit."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.names: list[tuple[bytes, pyfuse3.EntryAttributes, int]] = []

    def add(self, token: object, name: bytes, attributes: pyfuse3.EntryAttributes, cursor: int) -> bool:
        if len(self.names) == self.room:
            return False
        self.names.append((name, attributes, cursor))
        return True


async def test_directories_are_read_in_pieces_with_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = await mounted(*(f"d/{number}" for number in range(20)))
    directory = (await made.lookup("d")).st_ino
    handle = await made.operations.opendir(directory, context())
    assert handle == directory
    seen: dict[bytes, pyfuse3.EntryAttributes] = {}
    offset = 0
    while True:
        reply = Dirent(3)
        monkeypatch.setattr(pyfuse3, "readdir_reply", reply.add)
        await made.operations.readdir(handle, offset, cast(Any, None))
        if not reply.names:
            break
        for name, attributes, cursor in reply.names:
            assert name not in seen
            seen[name] = attributes
            offset = cursor
        if len(seen) == 9:  # the listing changes in between
            made.objects.put("d/new")
            await made.catalog.listings.refresh()
    assert {b".", b"..", *(str(number).encode() for number in range(20))} <= set(seen)
    assert seen[b"."].st_ino == directory
    assert seen[b".."].st_ino == ROOT
    assert seen[b"7"].st_size == 10_000
    await made.operations.releasedir(handle)
    await made.operations.fsyncdir(handle, False)


async def test_readdir_counts_as_a_lookup_of_each_name(monkeypatch: pytest.MonkeyPatch) -> None:
    made = await mounted("a", "b")
    reply = Dirent(3)  # '.', '..' and one name
    monkeypatch.setattr(pyfuse3, "readdir_reply", reply.add)
    await made.operations.readdir(ROOT, 0, cast(Any, None))
    number = reply.names[2][1].st_ino
    for key in ("a", "b"):
        made.objects.delete(key)
    await made.catalog.listings.refresh()
    assert (await made.operations.getattr(number, context())).st_size == 10_000
    await made.operations.forget([(number, 1)])
    assert await number_of(made.operations.getattr(number, context())) == errno.ESTALE


async def test_a_source_that_was_never_listed_is_an_error_and_not_an_empty_directory() -> None:
    good, bad = Objects("memory://good"), Objects("memory://bad")
    bad.error = errors.UnavailableError("down")
    catalog = Catalog(
        [good.source("good"), bad.source("bad")], ttl=60, snapshot_dir=None, events=EventHub(), clock=Hand()
    )
    await catalog.listings.start()
    operations = Operations(catalog, RecordingOpenFiles(), AttributePolicy(0, 0))
    number = (await operations.lookup(ROOT, b"bad", context())).st_ino
    assert await number_of(operations.opendir(number, context())) == errno.EIO
    assert await number_of(operations.lookup(number, b"a", context())) == errno.EIO
    assert await operations.opendir(ROOT, context()) == ROOT
    with trio.fail_after(5):
        await operations.opendir((await operations.lookup(ROOT, b"good", context())).st_ino, context())
