"""Memory files that carry a configuration with its secrets to a program: nothing on a disk, in an argument or in the
environment. Standard library only."""

from __future__ import annotations

import fcntl
import os

_F_ADD_SEALS = 1033
_ALL_SEALS = 0x1 | 0x2 | 0x4 | 0x8  # no more seals, shrinking, growing, writing


def make_sealed_memfd(name: str, data: bytes) -> int:
    """The descriptor of a new memory file with this content, at its start: a process that inherits it can read it, and
    no process can change it. The caller closes it. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(data)
        os.lseek(fd, 0, os.SEEK_SET)
        fcntl.fcntl(fd, _F_ADD_SEALS, _ALL_SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd
