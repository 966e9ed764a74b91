"""FUSE requests in words, for the access trace: which operation, on what name, with which arguments.

Source: include/uapi/linux/fuse.h of Linux 6.18. What is not known here is told by its number. Lengths come from the
kernel, but nothing is read past the end of a request. Pure: no I/O.
"""

from __future__ import annotations

import os
import struct
from typing import Any

BODY_OFFSET = 40
"""Where the arguments begin: behind fuse_in_header."""

LOOKUP, FORGET, GETATTR, SETATTR, READ, INIT, INTERRUPT = 1, 2, 3, 4, 15, 26, 36
OPEN, CREATE, OPENDIR, DESTROY, NOTIFY_REPLY, BATCH_FORGET = 14, 35, 27, 38, 41, 42

_OPERATION_NAMES = {
    LOOKUP: "lookup",
    GETATTR: "getattr",
    SETATTR: "setattr",
    5: "readlink",
    6: "symlink",
    8: "mknod",
    9: "mkdir",
    10: "unlink",
    11: "rmdir",
    12: "rename",
    13: "link",
    OPEN: "open",
    READ: "read",
    16: "write",
    17: "statfs",
    18: "release",
    20: "fsync",
    21: "setxattr",
    22: "getxattr",
    23: "listxattr",
    24: "removexattr",
    25: "flush",
    OPENDIR: "opendir",
    28: "readdir",
    29: "releasedir",
    30: "fsyncdir",
    34: "access",
    CREATE: "create",
    39: "ioctl",
    40: "poll",
    43: "fallocate",
    44: "readdir",
    45: "rename",
    46: "lseek",
    47: "copy_file_range",
    50: "syncfs",
    51: "create",
    52: "statx",
}
_KERNEL_OPCODES = frozenset({FORGET, INIT, INTERRUPT, DESTROY, NOTIFY_REPLY, BATCH_FORGET})
"""What the kernel does on its own account."""

_NAME_OFFSETS = {LOOKUP: 0, 6: 0, 8: 16, 9: 8, 10: 0, 11: 0, 12: 8, 13: 8, CREATE: 16, 45: 16}
"""Operation on a name in the directory -> where the name begins, behind BODY."""
_XATTR_NAME_OFFSETS = {21: 8, 22: 8, 24: 0}
"""Operation on an extended attribute -> where its name begins."""

_U32 = struct.Struct("<I")
_RANGE = struct.Struct("<QQI")
"""fh, offset, size."""
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
    """The name of the operation."""
    return _OPERATION_NAMES.get(opcode, f"request {opcode}")


def parse_arguments(opcode: int, body: memoryview) -> dict[str, Any]:
    """What the request says besides its inode: "name" below that directory, "flags", "offset" and "size", "xattr",
    "command", "whence". `body` is what follows the header."""
    try:
        if opcode == READ:
            _, offset, size = _RANGE.unpack_from(body)
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
    if opcode in (OPEN, CREATE, 51):
        found["flags"] = _format_open_flags(_U32.unpack_from(body)[0])
    elif opcode == GETATTR:
        if _U32.unpack_from(body)[0] & 1:
            found["by"] = "handle"
    elif opcode == 16:
        _, found["offset"], found["size"] = _RANGE.unpack_from(body)
    elif opcode == 46:
        _, found["offset"], whence = _RANGE.unpack_from(body)
        found["whence"] = _WHENCE_NAMES[whence] if whence < len(_WHENCE_NAMES) else str(whence)
    elif opcode == 39:
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
