"""The FUSE operations: a thin shell around the catalog and the open files.

All of it is read-only: an operation that would change something fails with EROFS, also when the kernel was not told
`ro`.
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
from typing import TYPE_CHECKING, Final, NoReturn

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, StatvfsData

from fusecache.catalog.catalog import Catalog
from fusecache.catalog.entry import ROOT, Entry
from fusecache.errors import FusecacheError
from fusecache_mount.device.open_files import OpenFiles
from fusecache_mount.kernel.errnos import errno_of
from fusecache_mount.kernel.nodeids import inode_number, passthrough_nodeid

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = logging.getLogger(__name__)

STAT_BLOCK_BYTES: Final = 4096
"""st_blksize and f_frsize in bytes: llama.cpp aligns O_DIRECT to the first, and caches divide by the second."""
NAME_MAX: Final = 255
XATTR_PREFIX: Final = b"user.fusecache."
_DOT_CURSOR, _DOTDOT_CURSOR = 1, 2
_MAX_NEGATIVE_LOOKUPS = 4096


@dataclass(frozen=True)
class AttributePolicy:
    """The attributes of all files, no matter who uploaded them.

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


@contextmanager
def _raising_fuse_errors() -> Iterator[None]:
    """Turn every error into an errno that the system call fails with: any other error that came out would end the
    mount."""
    try:
        yield
    except FUSEError:
        raise
    except FusecacheError as error:
        raise FUSEError(errno_of(error)) from error
    except Exception as error:
        _log.exception("a request failed in an unforeseen way")
        raise FUSEError(errno.EIO) from error


def _refuse_change() -> NoReturn:
    raise FUSEError(errno.EROFS)


class Operations(pyfuse3.Operations):
    """Serves the names of `catalog` and the bytes of `open_files` to the kernel; attributes are as `policy` says."""

    def __init__(self, catalog: Catalog, open_files: OpenFiles, policy: AttributePolicy) -> None:
        super().__init__()
        self._catalog = catalog
        self._open_files = open_files
        self._policy = policy
        self._file_mode = stat.S_IFREG | (policy.file_mode & ~policy.umask & 0o777)
        self._dir_mode = stat.S_IFDIR | (policy.dir_mode & ~policy.umask & 0o777)
        self.negative_lookups: deque[tuple[int, bytes]] = deque(maxlen=_MAX_NEGATIVE_LOOKUPS)
        """Directory and name of lookups that found nothing, the latest ones: the kernel may still know that."""

    # -- names and attributes

    def _find_entry(self, nodeid: int) -> Entry:
        """Raises ESTALE for a nodeid of an earlier version: the VFS then looks the path up again."""
        entry = self._catalog.nodes.entry_by_nodeid(inode_number(nodeid))
        if entry is None:
            raise FUSEError(errno.ESTALE)
        return entry

    def _build_attributes(self, entry: Entry, nodeid: int, lifetime: float) -> EntryAttributes:
        policy = self._policy
        attributes = EntryAttributes()
        attributes.st_ino = nodeid
        attributes.st_uid = policy.uid
        attributes.st_gid = policy.gid
        attributes.st_blksize = STAT_BLOCK_BYTES
        attributes.st_atime_ns = attributes.st_mtime_ns = attributes.st_ctime_ns = entry.mtime_ns
        attributes.entry_timeout = min(policy.entry_timeout, lifetime)
        if entry.is_dir:
            attributes.st_mode = self._dir_mode
            attributes.st_nlink = 2
            attributes.st_size = STAT_BLOCK_BYTES
            attributes.st_blocks = STAT_BLOCK_BYTES // 512
            attributes.attr_timeout = min(policy.attr_timeout, lifetime)
        else:
            attributes.st_mode = self._file_mode
            attributes.st_nlink = 1
            attributes.st_size = entry.size
            attributes.st_blocks = -(-entry.size // 512)
            attributes.attr_timeout = policy.attr_timeout  # of one version: they never change
        return attributes

    def _choose_nodeid(self, entry: Entry) -> int:
        if entry.version is not None and self._open_files.resolves_to_passthrough(entry.version):
            return passthrough_nodeid(entry.nodeid)
        return entry.nodeid

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Find a name; its absence is an answer that the kernel may keep."""
        with _raising_fuse_errors():
            if name == b".":
                found: Entry | None = self._find_entry(parent_inode)
            elif name == b"..":
                found = self._find_entry(self._find_entry(parent_inode).parent)
            elif len(name) > NAME_MAX:
                raise FUSEError(errno.ENAMETOOLONG)
            else:
                found = await self._catalog.listings.lookup_fresh(inode_number(parent_inode), name)
            if found is None:
                absent = EntryAttributes()
                absent.st_ino = 0
                self.negative_lookups.append((parent_inode, name))
                lifetime = self._catalog.listings.remaining_negative_ttl(parent_inode)
                absent.entry_timeout = min(self._policy.negative_timeout, lifetime)
                return absent
            self._catalog.nodes.retain_nodeid(found.nodeid)
            return self._build_attributes(
                found, self._choose_nodeid(found), self._catalog.listings.remaining_ttl(found)
            )

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """The kernel dropped so many lookups of these nodeids."""
        for nodeid, count in inode_list:
            self._catalog.nodes.release_nodeid(inode_number(nodeid), count)

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """The attributes of a nodeid."""
        with _raising_fuse_errors():
            entry = self._find_entry(inode)
            return self._build_attributes(entry, inode, self._catalog.listings.remaining_ttl(entry))

    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        """access(2), where the kernel does not judge by the mode itself."""
        with _raising_fuse_errors():
            entry = self._find_entry(inode)
            if mode & os.W_OK:
                _refuse_change()
            bits = self._dir_mode if entry.is_dir else self._file_mode
            if ctx.uid == 0:
                return not mode & os.X_OK or entry.is_dir or bool(bits & 0o111)
            if ctx.uid == self._policy.uid:
                bits >>= 6
            elif ctx.gid == self._policy.gid or self._policy.gid in _supplementary_groups(ctx):
                bits >>= 3
            return mode & bits & 7 == mode

    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """There are no symbolic links."""
        raise FUSEError(errno.EINVAL)

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """The cache as a file system: its limit, and what is left of it."""
        with _raising_fuse_errors():
            used, limit = await trio.to_thread.run_sync(self._open_files.cache_usage)
            files, _ = self._catalog.index.totals
            found = StatvfsData()
            found.f_bsize = found.f_frsize = STAT_BLOCK_BYTES
            found.f_blocks = max(1, limit // STAT_BLOCK_BYTES)
            found.f_bfree = found.f_bavail = max(0, limit - used) // STAT_BLOCK_BYTES
            found.f_files = files + 1
            found.f_ffree = found.f_favail = 0
            found.f_namemax = NAME_MAX
            return found

    # -- directories

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Open a directory, with a listing as fresh as can be had; the handle is its nodeid."""
        with _raising_fuse_errors():
            entry = self._find_entry(inode)
            if not entry.is_dir:
                raise FUSEError(errno.ENOTDIR)
            await self._catalog.listings.require_fresh_listing(entry)
            return inode

    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        """Names with their attributes; offsets are hashes of the names, which stay when others come and go."""
        with _raising_fuse_errors():
            catalog = self._catalog
            directory = self._find_entry(fh)
            lifetime = catalog.listings.remaining_ttl(directory)
            if start_id < _DOT_CURSOR:
                attributes = self._build_attributes(directory, directory.nodeid, lifetime)
                if not pyfuse3.readdir_reply(token, b".", attributes, _DOT_CURSOR):
                    return
            if start_id < _DOTDOT_CURSOR:
                above = catalog.nodes.entry_by_nodeid(directory.parent) or directory
                attributes = self._build_attributes(above, above.nodeid, lifetime)
                if not pyfuse3.readdir_reply(token, b"..", attributes, _DOTDOT_CURSOR):
                    return
            top = directory.nodeid == ROOT and directory.source == ""
            for cursor, entry in catalog.index.scan_directory(directory.nodeid, start_id):
                if top:
                    lifetime = catalog.listings.remaining_ttl(entry)
                attributes = self._build_attributes(entry, self._choose_nodeid(entry), lifetime)
                if not pyfuse3.readdir_reply(token, entry.name, attributes, cursor):
                    return
                catalog.nodes.retain_nodeid(entry.nodeid)

    async def releasedir(self, fh: int) -> None:
        """Nothing is held for an open directory."""

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Nothing is ever dirty."""

    # -- files

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open for reading; the handle is the nodeid. ESTALE when the path leads to another version by now."""
        with _raising_fuse_errors():
            if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
                _refuse_change()
            found = self._catalog.nodes.entry_by_nodeid(inode_number(inode))
            if found is None or not self._catalog.index.is_current(found.nodeid):
                self._open_files.record_stale_answer(found.path if found is not None else None, ctx.pid)
                raise FUSEError(errno.ESTALE)
            if found.is_dir:
                raise FUSEError(errno.EISDIR)
            await self._open_files.open(inode, ctx.pid)
            return FileInfo(fh=inode, keep_cache=True, direct_io=False)

    async def read(self, fh: int, off: int, size: int) -> Buffer:  # type: ignore[override]
        """Bytes, where the channel leaves READ to pyfuse3. Short only at the end of the file."""
        with _raising_fuse_errors():
            return await self._open_files.read(fh, off, size)

    async def release(self, fh: int) -> None:
        """The last descriptor and mapping of one open is gone."""
        with _raising_fuse_errors():
            self._open_files.release(fh)

    async def flush(self, fh: int) -> None:
        """Nothing is ever dirty: the kernel need not say that a descriptor is closed, and won't again."""
        raise FUSEError(errno.ENOSYS)

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Nothing is ever dirty."""

    # -- extended attributes

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """One of ours, or ENODATA."""
        with _raising_fuse_errors():
            entry = self._find_entry(inode)
            if name not in self._xattr_names(entry):
                raise FUSEError(pyfuse3.ENOATTR)
            version = entry.version
            what = name.removeprefix(XATTR_PREFIX)
            if what == b"source":
                return _encode_text(self._catalog.listings.origin_identity(entry))
            assert version is not None
            if what == b"etag":
                return _encode_text(version.etag)
            if what == b"version":
                return _encode_text(version.id)
            cached = await trio.to_thread.run_sync(self._open_files.cached_bytes, entry.nodeid, version)
            return str(cached).encode()

    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        """The names of the extended attributes."""
        with _raising_fuse_errors():
            return self._xattr_names(self._find_entry(inode))

    def _xattr_names(self, entry: Entry) -> Sequence[bytes]:
        names: tuple[bytes, ...] = (b"etag", b"version", b"cached_bytes") if not entry.is_dir else ()
        if self._catalog.listings.origin_identity(entry):
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
        _refuse_change()

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        """EROFS."""
        _refuse_change()

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        """EROFS."""
        _refuse_change()

    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """EROFS."""
        _refuse_change()

    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """EROFS."""
        _refuse_change()

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """EROFS."""
        _refuse_change()

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
        _refuse_change()

    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """EROFS."""
        _refuse_change()

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """EROFS."""
        _refuse_change()

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """EROFS."""
        _refuse_change()

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """EROFS."""
        _refuse_change()

    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        """EROFS."""
        _refuse_change()


def _encode_text(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _supplementary_groups(ctx: RequestContext) -> set[int]:
    try:
        return pyfuse3.get_sup_groups(ctx.pid)
    except Exception:  # the process has ended meanwhile, or lives in another pid namespace
        return set()
