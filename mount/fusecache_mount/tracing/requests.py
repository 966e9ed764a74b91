"""FUSE requests in words, for the access trace: which operation, on what name, with which arguments.

Source: include/uapi/linux/fuse.h of Linux 6.18. A request that is not known here is told by its number. Lengths come
from the kernel, but nothing is read past the end of a request. Pure: no I/O.
"""

from __future__ import annotations

import os
import struct
from typing import Any

from fusecache_mount.kernel.protocol import IN_HEADER, READ_IN, Opcode

BODY_OFFSET = IN_HEADER.size
"""Where the arguments begin in a request: behind fuse_in_header."""

_KERNEL_OPCODES = frozenset(
    {
        Opcode.FORGET,
        Opcode.INIT,
        Opcode.INTERRUPT,
        Opcode.DESTROY,
        Opcode.NOTIFY_REPLY,
        Opcode.BATCH_FORGET,
    }
)
"""Requests that the kernel makes on its own account."""
_COMMON_NAMES: dict[int, str] = {
    Opcode.READDIRPLUS: "readdir",
    Opcode.RENAME2: "rename",
    Opcode.TMPFILE: "create",
}
"""Variants that a trace tells by the name of the operation they vary."""

_NAME_OFFSETS: dict[int, int] = {
    Opcode.LOOKUP: 0,
    Opcode.SYMLINK: 0,
    Opcode.MKNOD: 16,
    Opcode.MKDIR: 8,
    Opcode.UNLINK: 0,
    Opcode.RMDIR: 0,
    Opcode.RENAME: 8,
    Opcode.LINK: 8,
    Opcode.CREATE: 16,
    Opcode.RENAME2: 16,
}
"""Operation on a name in the directory -> where the name begins, behind the header."""
_XATTR_NAME_OFFSETS: dict[int, int] = {Opcode.SETXATTR: 8, Opcode.GETXATTR: 8, Opcode.REMOVEXATTR: 0}
"""Operation on an extended attribute -> where its name begins, behind the header."""

_U32 = struct.Struct("<I")
_OPEN_FLAG_NAMES = {
    os.O_TRUNC: "O_TRUNC",
    os.O_APPEND: "O_APPEND",
    os.O_CREAT: "O_CREAT",
    os.O_EXCL: "O_EXCL",
    os.O_DIRECT: "O_DIRECT",
    os.O_NONBLOCK: "O_NONBLOCK",
    os.O_NOATIME: "O_NOATIME",
}
_ACCESS_MODE_NAMES = ("O_RDONLY", "O_WRONLY", "O_RDWR", "O_ACCMODE")
_WHENCE_NAMES = ("SEEK_SET", "SEEK_CUR", "SEEK_END", "SEEK_DATA", "SEEK_HOLE")


def is_program_request(opcode: int) -> bool:
    """Whether this request is something that a program did."""
    return opcode not in _KERNEL_OPCODES


def operation_name(opcode: int) -> str:
    """The name of the operation, in lower case; "request N" for a number that is not known here."""
    try:
        known = Opcode(opcode)
    except ValueError:
        return f"request {opcode}"
    return _COMMON_NAMES.get(known) or known.name.lower()


def parse_arguments(opcode: int, body: memoryview) -> dict[str, Any]:
    """The arguments of the request, besides its inode: "name" below that directory, "flags", "offset" and "size",
    "xattr", "command", "whence". `body` is what follows the header."""
    try:
        if opcode == Opcode.READ:
            _, offset, size = READ_IN.unpack_from(body)
            return {"offset": offset, "size": size}
        return _parse_rare_arguments(opcode, body)
    except struct.error:  # shorter than it should be: then it is told without its arguments
        return {}


def _parse_rare_arguments(opcode: int, body: memoryview) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if opcode in _NAME_OFFSETS:
        found["name"] = _decode_text(body, _NAME_OFFSETS[opcode])
    if opcode in _XATTR_NAME_OFFSETS:
        found["xattr"] = _decode_text(body, _XATTR_NAME_OFFSETS[opcode])
    if opcode in (Opcode.OPEN, Opcode.CREATE, Opcode.TMPFILE):
        found["flags"] = _format_open_flags(_U32.unpack_from(body)[0])
    elif opcode == Opcode.GETATTR:
        if _U32.unpack_from(body)[0] & 1:
            found["by"] = "handle"
    elif opcode == Opcode.WRITE:
        _, found["offset"], found["size"] = READ_IN.unpack_from(body)
    elif opcode == Opcode.LSEEK:
        _, found["offset"], whence = READ_IN.unpack_from(body)
        found["whence"] = _WHENCE_NAMES[whence] if whence < len(_WHENCE_NAMES) else str(whence)
    elif opcode == Opcode.IOCTL:
        found["command"] = f"0x{_U32.unpack_from(body, 12)[0]:x}"
    return found


def _decode_text(body: memoryview, at: int) -> str:
    return bytes(body[at:]).partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _format_open_flags(flags: int) -> str:
    names = [
        _ACCESS_MODE_NAMES[flags & os.O_ACCMODE],
        *(name for bit, name in _OPEN_FLAG_NAMES.items() if flags & bit == bit),
    ]
    return "|".join(names)
