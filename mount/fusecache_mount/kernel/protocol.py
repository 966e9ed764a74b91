"""The few parts of the FUSE wire format that the channel reads or rewrites itself.

Source: include/uapi/linux/fuse.h of Linux 6.18 (protocol 7.45); all numbers are in the machine's byte order. A
request is `fuse_in_header` (40 bytes) and its arguments, a reply `fuse_out_header` (16 bytes) and its results.
Offsets named `*_OUT_*` count from the start of the reply, its header included. Pure: no I/O,
and the standard library only.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from fusecache_mount.kernel.nodeids import inode_number


class Opcode(IntEnum):
    """The operation that a request asks for: enum fuse_opcode, without locks, bmap and DAX, which a mount like ours
    never gets."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52


OPCODES_WITHOUT_REPLY = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})
"""Requests that the kernel expects no reply to."""

NOTIFY_INVAL_ENTRY = 3
NOTIFY_RESEND = 7

FOPEN_KEEP_CACHE = 1 << 1
FOPEN_PASSTHROUGH = 1 << 7

INIT_ASYNC_DIO = 1 << 15
INIT_MAX_PAGES = 1 << 22
INIT_EXT = 1 << 30
INIT2_PASSTHROUGH = 1 << (37 - 32)
INIT2_EXPIRE_ONLY = 1 << (35 - 32)
INIT2_HAS_RESEND = 1 << (39 - 32)

IN_HEADER = struct.Struct("<IIQQIIIHH")
"""len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding."""
OUT_HEADER = struct.Struct("<IiQ")
"""len, -errno, unique."""
READ_IN = struct.Struct("<QQI")
"""fh, offset, size: the start of fuse_read_in, at 40."""
OPEN_IN = struct.Struct("<II")
"""flags, open_flags: fuse_open_in, at 40."""
INTERRUPT_IN = struct.Struct("<Q")
BACKING_MAP = struct.Struct("<iIQ")
"""fuse_backing_map: fd, flags, padding."""
_OPEN_OUT = struct.Struct("<QIi")
"""fh, open_flags, backing_id, at 16."""
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_INVAL_ENTRY = struct.Struct("<QII")
_EXPIRE_ONLY = 1
_DIRENT = struct.Struct("<QQII")

PAGE_BYTES = 4096
MAX_READ_PAGES = 256
"""Of the largest READ: 1 MiB, fuse.max_pages_limit as delivered, and what the channel splices through one pipe."""

IOC_BACKING_OPEN = (1 << 30) | (16 << 16) | (229 << 8) | 1
IOC_BACKING_CLOSE = (1 << 30) | (4 << 16) | (229 << 8) | 2

_ENTRY_OUT = 128
"""Size of fuse_entry_out: nodeid, generation, timeouts (40 bytes), then fuse_attr, which begins with ino."""
_ENTRY_TIMES = struct.Struct("<QQII")
"""entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec, at 16 of fuse_entry_out."""


@dataclass(frozen=True)
class InitLimits:
    """The limits that the channel asks for in INIT: requests in flight in the background, pages of a READ, bytes of a
    WRITE (which never comes: the least that the kernel allows)."""

    max_background: int
    max_pages: int = MAX_READ_PAGES
    max_write: int = 4096


def supports_passthrough(init_request: bytes) -> bool:
    """Whether the kernel that sent this INIT can do passthrough (Linux >= 6.9 with CONFIG_FUSE_PASSTHROUGH)."""
    if len(init_request) < 60:
        return False
    flags = _U32.unpack_from(init_request, 52)[0]
    flags2 = _U32.unpack_from(init_request, 56)[0]
    return bool(flags & INIT_EXT and flags2 & INIT2_PASSTHROUGH)


def supports_resend(init_request: bytes) -> bool:
    """Whether this kernel knows FUSE_NOTIFY_RESEND (Linux >= 6.9)."""
    return len(init_request) >= 60 and bool(_U32.unpack_from(init_request, 56)[0] & INIT2_HAS_RESEND)


def supports_expire(init_request: bytes) -> bool:
    """Whether this kernel can let a name expire without dropping what is below it (Linux >= 6.2)."""
    return len(init_request) >= 60 and bool(_U32.unpack_from(init_request, 56)[0] & INIT2_EXPIRE_ONLY)


def rewrite_init(reply: bytearray, limits: InitLimits, *, passthrough: bool) -> None:
    """Ask for passthrough and for deep queues in pyfuse3's INIT reply, which is at least 64 bytes long."""
    if _status_of(reply) != 0 or len(reply) < 56:
        return
    flags = _U32.unpack_from(reply, 28)[0] | INIT_ASYNC_DIO
    flags2 = _U32.unpack_from(reply, 48)[0]
    if passthrough:
        flags |= INIT_EXT
        flags2 |= INIT2_PASSTHROUGH
        _U32.pack_into(reply, 52, 1)  # max_stack_depth: the backing file lies on a plain file system
    _U32.pack_into(reply, 28, flags)
    struct.pack_into("<HH", reply, 32, limits.max_background, max(1, limits.max_background * 3 // 4))
    _U32.pack_into(reply, 36, limits.max_write)
    if flags & INIT_MAX_PAGES:
        struct.pack_into("<H", reply, 44, min(limits.max_pages, struct.unpack_from("<H", reply, 44)[0]))
    _U32.pack_into(reply, 48, flags2)


def open_reply(unique: int, handle: int, backing_id: int) -> bytes:
    """A whole reply to OPEN: passthrough to this backing."""
    header = OUT_HEADER.pack(OUT_HEADER.size + _OPEN_OUT.size, 0, unique)
    return header + _OPEN_OUT.pack(handle, FOPEN_PASSTHROUGH, backing_id)


def rewrite_open(reply: bytearray, backing_id: int) -> None:
    """Turn a successful OPEN reply into a passthrough open of this backing id."""
    handle, flags, _ = _OPEN_OUT.unpack_from(reply, 16)
    _OPEN_OUT.pack_into(reply, 16, handle, (flags | FOPEN_PASSTHROUGH) & ~FOPEN_KEEP_CACHE, backing_id)


def rewrite_as_uncached(reply: bytearray, opcode: int) -> None:
    """Have the kernel look this name up again at its next use, and drop the pages of a file that is opened.

    Attributes stay as trusted as they are: without that every step of a path, and every read, costs a GETATTR that
    no program asked for.
    """
    if _status_of(reply) != 0:
        return
    if opcode == Opcode.OPEN and len(reply) >= 16 + _OPEN_OUT.size:
        handle, flags, backing_id = _OPEN_OUT.unpack_from(reply, 16)
        _OPEN_OUT.pack_into(reply, 16, handle, flags & ~FOPEN_KEEP_CACHE, backing_id)
    elif opcode == Opcode.LOOKUP and len(reply) >= 16 + _ENTRY_OUT:
        _expire_entry(reply, 16)
    elif opcode == Opcode.READDIRPLUS:
        for at in _direntplus_offsets(reply):
            _expire_entry(reply, at)


def _expire_entry(reply: bytearray, at: int) -> None:
    _, attributes, _, nanoseconds = _ENTRY_TIMES.unpack_from(reply, at + 16)
    _ENTRY_TIMES.pack_into(reply, at + 16, 0, attributes, 0, nanoseconds)


def is_negative_lookup(reply: bytes | bytearray) -> bool:
    """Whether a successful LOOKUP reply says that the name does not exist."""
    return len(reply) >= 24 and _U64.unpack_from(reply, 16)[0] == 0


def rewrite_inode_numbers(reply: bytearray, opcode: int) -> None:
    """Give both nodeids of a file the same st_ino; pyfuse3 sets it to the nodeid."""
    if _status_of(reply) != 0:
        return
    if opcode == Opcode.LOOKUP and len(reply) >= 16 + _ENTRY_OUT:
        _clear_passthrough_bit(reply, 16 + 40)
    elif opcode == Opcode.GETATTR and len(reply) >= 16 + 24:
        _clear_passthrough_bit(reply, 16 + 16)
    elif opcode == Opcode.READDIRPLUS:
        for at in _direntplus_offsets(reply):
            _clear_passthrough_bit(reply, at + 40)
            _clear_passthrough_bit(reply, at + _ENTRY_OUT)


def _direntplus_offsets(reply: bytearray) -> Iterator[int]:
    at = 16
    while at + _ENTRY_OUT + _DIRENT.size <= len(reply):
        yield at
        name_length = _DIRENT.unpack_from(reply, at + _ENTRY_OUT)[2]
        at += _ENTRY_OUT + (_DIRENT.size + name_length + 7) // 8 * 8


def _clear_passthrough_bit(reply: bytearray, at: int) -> None:
    _U64.pack_into(reply, at, inode_number(_U64.unpack_from(reply, at)[0]))


def _status_of(reply: bytes | bytearray) -> int:
    return int(OUT_HEADER.unpack_from(reply)[1])


def error_reply(unique: int, errno: int) -> bytes:
    """A whole reply that carries an error."""
    return OUT_HEADER.pack(OUT_HEADER.size, -errno, unique)


def resend_notification() -> bytes:
    """FUSE_NOTIFY_RESEND: send all requests again that were read from the device and not answered."""
    return OUT_HEADER.pack(OUT_HEADER.size, NOTIFY_RESEND, 0)


def inval_entry_notification(parent: int, name: bytes, *, expire_only: bool = False) -> bytes:
    """FUSE_NOTIFY_INVAL_ENTRY: forget what `name` in `parent` is; with `expire_only` only ask again at its next
    use."""
    body = _INVAL_ENTRY.pack(parent, len(name), _EXPIRE_ONLY if expire_only else 0) + name + b"\0"
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), NOTIFY_INVAL_ENTRY, 0) + body
