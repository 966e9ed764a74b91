"""The FUSE operations: a thin shell around the catalog and the open files.

All of it is read-only: whatever would change something fails with EROFS, also when the kernel was not told `ro`.
A file handle is the nodeid, of files and directories alike, so that a daemon that is started anew under an open
handle needs no table to go on. READ normally never comes here: the channel answers it.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn, Protocol

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, StatvfsData

from fusecache.catalog.catalog import Catalog
from fusecache.catalog.entry import ROOT, Entry
from fusecache.errors import FusecacheError
from fusecache.mount.errnos import errno_of
from fusecache.mount.nodeids import inode_number, passthrough_twin

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = logging.getLogger(__name__)

BLOCK: Final = 4096
"""st_blksize and f_frsize in bytes: llama.cpp aligns O_DIRECT to the first, and caches divide by the second."""
NAME_MAX: Final = 255
XATTR_PREFIX: Final = b"user.fusecache."
_DOT, _DOTDOT = 1, 2
_ABSENT = 4096


@dataclass(frozen=True)
class AttributePolicy:
    """What the attributes of all files are, whoever uploaded them.

    `file_mode` and `dir_mode` are permission bits, with `umask` taken away. Timeouts are in seconds: how long the
    kernel may use a name (`entry_timeout`), attributes (`attr_timeout`) and the absence of a name
    (`negative_timeout`) without asking; a name never outlives the listing it comes from.
    """

    uid: int
    gid: int
    file_mode: int = 0o444
    dir_mode: int = 0o555
    umask: int = 0
    entry_timeout: float = 60.0
    attr_timeout: float = 60.0
    negative_timeout: float = 60.0


class Handles(Protocol):
    """What the operations ask of the open files."""

    def use_passthrough(self, entry: Entry) -> bool:
        """Whether LOOKUP leads to the passthrough twin."""

    async def open(self, nodeid: int, flags: int, thread: int) -> None:
        """Open a file, either twin, for this thread. Raises FusecacheError."""

    def sent_back(self, path: str | None, thread: int) -> None:
        """This thread's open of this path (None: not known) is answered ESTALE: the VFS comes back once, and only
        once."""

    def release(self, nodeid: int) -> None:
        """One open less."""

    async def read(self, nodeid: int, offset: int, size: int) -> Buffer:
        """Bytes for a READ that the channel did not answer. Raises FusecacheError."""

    def cached_bytes(self, entry: Entry) -> int:
        """Bytes of this file in the store. May block."""

    def usage(self) -> tuple[int, int]:
        """Bytes used, and the limit, of the cache. May block."""


@contextmanager
def _errnos() -> Iterator[None]:
    """Turn errors into what the system call fails with. Whatever else came out would end the mount."""
    try:
        yield
    except FUSEError:
        raise
    except FusecacheError as error:
        raise FUSEError(errno_of(error)) from error
    except Exception as error:
        _log.exception("a request failed in an unforeseen way")
        raise FUSEError(errno.EIO) from error


def _read_only() -> NoReturn:
    raise FUSEError(errno.EROFS)


class Operations(pyfuse3.Operations):
    """Serves `catalog` and `handles` to the kernel under `policy`."""

    def __init__(self, catalog: Catalog, handles: Handles, policy: AttributePolicy) -> None:
        super().__init__()
        self._catalog = catalog
        self._handles = handles
        self._policy = policy
        self._file_mode = stat.S_IFREG | (policy.file_mode & ~policy.umask & 0o777)
        self._dir_mode = stat.S_IFDIR | (policy.dir_mode & ~policy.umask & 0o777)
        self.absent: deque[tuple[int, bytes]] = deque(maxlen=_ABSENT)
        """Directory and name of lookups that found nothing, the latest ones: the kernel may still know that."""

    # -- names and attributes

    def _entry(self, nodeid: int) -> Entry:
        """Raises ESTALE for a nodeid of an earlier version: the VFS then looks the path up again."""
        entry = self._catalog.get(inode_number(nodeid))
        if entry is None:
            raise FUSEError(errno.ESTALE)
        return entry

    def _attributes(self, entry: Entry, nodeid: int, lifetime: float) -> EntryAttributes:
        policy = self._policy
        attributes = EntryAttributes()
        attributes.st_ino = nodeid
        attributes.st_uid = policy.uid
        attributes.st_gid = policy.gid
        attributes.st_blksize = BLOCK
        attributes.st_atime_ns = attributes.st_mtime_ns = attributes.st_ctime_ns = entry.mtime_ns
        attributes.entry_timeout = min(policy.entry_timeout, lifetime)
        if entry.is_dir:
            attributes.st_mode = self._dir_mode
            attributes.st_nlink = 2
            attributes.st_size = BLOCK
            attributes.st_blocks = BLOCK // 512
            attributes.attr_timeout = min(policy.attr_timeout, lifetime)
        else:
            attributes.st_mode = self._file_mode
            attributes.st_nlink = 1
            attributes.st_size = entry.size
            attributes.st_blocks = -(-entry.size // 512)
            attributes.attr_timeout = policy.attr_timeout  # of one version: they never change
        return attributes

    def _number(self, entry: Entry) -> int:
        if not entry.is_dir and self._handles.use_passthrough(entry):
            return passthrough_twin(entry.nodeid)
        return entry.nodeid

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Find a name; its absence is an answer that the kernel may keep."""
        with _errnos():
            if name == b".":
                found: Entry | None = self._entry(parent_inode)
            elif name == b"..":
                found = self._entry(self._entry(parent_inode).parent)
            elif len(name) > NAME_MAX:
                raise FUSEError(errno.ENAMETOOLONG)
            else:
                found = await self._catalog.resolve(inode_number(parent_inode), name)
            if found is None:
                absent = EntryAttributes()
                absent.st_ino = 0
                self.absent.append((parent_inode, name))
                lifetime = self._catalog.negative_lifetime(parent_inode)
                absent.entry_timeout = min(self._policy.negative_timeout, lifetime)
                return absent
            self._catalog.retain(found.nodeid)
            return self._attributes(found, self._number(found), self._catalog.lifetime(found))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """The kernel dropped so many lookups of these nodeids."""
        for nodeid, count in inode_list:
            self._catalog.release(inode_number(nodeid), count)

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """The attributes of a nodeid."""
        with _errnos():
            entry = self._entry(inode)
            return self._attributes(entry, inode, self._catalog.lifetime(entry))

    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        """access(2), where the kernel does not judge by the mode itself."""
        with _errnos():
            entry = self._entry(inode)
            if mode & os.W_OK:
                _read_only()
            bits = self._dir_mode if entry.is_dir else self._file_mode
            if ctx.uid == 0:
                return not mode & os.X_OK or entry.is_dir or bool(bits & 0o111)
            if ctx.uid == self._policy.uid:
                bits >>= 6
            elif ctx.gid == self._policy.gid or self._policy.gid in _groups(ctx):
                bits >>= 3
            return mode & bits & 7 == mode

    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """There are no symbolic links."""
        raise FUSEError(errno.EINVAL)

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """The cache as a file system: its limit, and what is left of it."""
        with _errnos():
            used, limit = await trio.to_thread.run_sync(self._handles.usage)
            files, _ = self._catalog.totals
            found = StatvfsData()
            found.f_bsize = found.f_frsize = BLOCK
            found.f_blocks = max(1, limit // BLOCK)
            found.f_bfree = found.f_bavail = max(0, limit - used) // BLOCK
            found.f_files = files + 1
            found.f_ffree = found.f_favail = 0
            found.f_namemax = NAME_MAX
            return found

    # -- directories

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Open a directory, with a listing as fresh as can be had; the handle is its nodeid."""
        with _errnos():
            entry = self._entry(inode)
            if not entry.is_dir:
                raise FUSEError(errno.ENOTDIR)
            await self._catalog.open_directory(entry)
            return inode

    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        """Names with their attributes; offsets are hashes of the names (see Catalog.scan)."""
        with _errnos():
            catalog = self._catalog
            directory = self._entry(fh)
            lifetime = catalog.lifetime(directory)
            if start_id < _DOT:
                attributes = self._attributes(directory, directory.nodeid, lifetime)
                if not pyfuse3.readdir_reply(token, b".", attributes, _DOT):
                    return
            if start_id < _DOTDOT:
                above = catalog.get(directory.parent) or directory
                attributes = self._attributes(above, above.nodeid, lifetime)
                if not pyfuse3.readdir_reply(token, b"..", attributes, _DOTDOT):
                    return
            top = directory.nodeid == ROOT and directory.source == ""
            for cursor, entry in catalog.scan(directory.nodeid, start_id):
                if top:
                    lifetime = catalog.lifetime(entry)
                attributes = self._attributes(entry, self._number(entry), lifetime)
                if not pyfuse3.readdir_reply(token, entry.name, attributes, cursor):
                    return
                catalog.retain(entry.nodeid)

    async def releasedir(self, fh: int) -> None:
        """Nothing is held for an open directory."""

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Nothing is ever dirty."""

    # -- files

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open for reading; the handle is the nodeid. ESTALE when the path leads to another version by now."""
        with _errnos():
            if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
                _read_only()
            found = self._catalog.get(inode_number(inode))
            if found is None or not self._catalog.is_current(found.nodeid):
                self._handles.sent_back(found.path if found is not None else None, ctx.pid)
                raise FUSEError(errno.ESTALE)
            if found.is_dir:
                raise FUSEError(errno.EISDIR)
            await self._handles.open(inode, flags, ctx.pid)
            return FileInfo(fh=inode, keep_cache=True, direct_io=False)

    async def read(self, fh: int, off: int, size: int) -> Buffer:  # type: ignore[override]
        """Bytes, where the channel leaves READ to pyfuse3. Short only at the end of the file."""
        with _errnos():
            return await self._handles.read(fh, off, size)

    async def release(self, fh: int) -> None:
        """The last descriptor and mapping of one open is gone."""
        with _errnos():
            self._handles.release(fh)

    async def flush(self, fh: int) -> None:
        """Nothing is ever dirty: the kernel need not say that a descriptor is closed, and won't again."""
        raise FUSEError(errno.ENOSYS)

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Nothing is ever dirty."""

    # -- extended attributes

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """One of ours, or ENODATA."""
        with _errnos():
            entry = self._entry(inode)
            if name not in self._xattrs(entry):
                raise FUSEError(pyfuse3.ENOATTR)
            version = entry.version
            what = name.removeprefix(XATTR_PREFIX)
            if what == b"source":
                return _text(self._catalog.identity(entry))
            assert version is not None
            if what == b"etag":
                return _text(version.etag)
            if what == b"version":
                return _text(version.id)
            cached = await trio.to_thread.run_sync(self._handles.cached_bytes, entry)
            return str(cached).encode()

    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        """The names of the extended attributes."""
        with _errnos():
            return self._xattrs(self._entry(inode))

    def _xattrs(self, entry: Entry) -> Sequence[bytes]:
        names: tuple[bytes, ...] = (b"etag", b"version", b"cached_bytes") if not entry.is_dir else ()
        if self._catalog.identity(entry):
            names = (*names, b"source")
        return [XATTR_PREFIX + name for name in names]

    # -- everything that would change something

    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """chmod, chown, truncate, utimes: EROFS."""
        _read_only()

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        """EROFS."""
        _read_only()

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        """EROFS."""
        _read_only()

    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """EROFS."""
        _read_only()

    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """EROFS."""
        _read_only()

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """EROFS."""
        _read_only()

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        """EROFS."""
        _read_only()

    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """EROFS."""
        _read_only()

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """EROFS."""
        _read_only()

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """EROFS."""
        _read_only()

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """EROFS."""
        _read_only()

    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        """EROFS."""
        _read_only()


def _text(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _groups(ctx: RequestContext) -> set[int]:
    try:
        return pyfuse3.get_sup_groups(ctx.pid)
    except Exception:  # the process has ended meanwhile, or lives in another pid namespace
        return set()
