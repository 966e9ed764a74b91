"""The passthrough backings of the kernel: files that it reads by itself for a FUSE inode."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import struct
import tempfile
from pathlib import Path

from fusecache_mount.kernel import protocol

_log = logging.getLogger(__name__)


class PassthroughState:
    """Whether passthrough is in use, and why, or why not, in words for the user.

    | From | By | To |
    |---|---|---|
    | active, not tried yet (`reason` is empty) | `confirm(reason)`: the kernel took a file | active, with a reason |
    | active, with or without a reason | `turn_off(reason)`: the kernel refused one | off, for good |
    | off, from the start or since then | | |

    Thread-safe: each transition is an assignment, and a thread that reads just before it is as right as one that came
    a moment earlier.
    """

    def __init__(self, is_active: bool, reason: str) -> None:
        self.is_active = is_active
        self.reason = reason

    def confirm(self, reason: str) -> None:
        """Passthrough was tried, and works."""
        self.reason = reason

    def turn_off(self, reason: str) -> None:
        """Fall back to the daemon for all opens to come; says so once in the log."""
        if self.is_active:
            self.is_active = False
            self.reason = reason
            _log.warning("passthrough is off: %s; reads go through the daemon", reason)


class Backings:
    """The backings of the connection of FUSE descriptor `device_fd`. Thread-safe."""

    def __init__(self, device_fd: int) -> None:
        self._device_fd = device_fd

    def open_backing(self, fd: int) -> int:
        """Have the kernel keep the file behind this descriptor; returns the number to name it by. Raises OSError."""
        request = bytearray(protocol.BACKING_MAP.pack(fd, 0, 0))
        return int(fcntl.ioctl(self._device_fd, protocol.IOC_BACKING_OPEN, request))

    def close_backing(self, backing_id: int) -> None:
        """Let it go; files that are open in the kernel keep it until they are closed."""
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._device_fd, protocol.IOC_BACKING_CLOSE, struct.pack("<I", backing_id))

    def find_refusal_reason(self, directory: Path) -> str:
        """Why the kernel does not take files of this directory, in words for the user; empty if it does. Makes a file
        there for a moment."""
        try:
            with tempfile.TemporaryFile(dir=directory) as file:
                self.close_backing(self.open_backing(file.fileno()))
        except OSError as error:
            if error.errno == errno.EPERM:
                return "it needs CAP_SYS_ADMIN: run the mount as root (in a container: --cap-add SYS_ADMIN)"
            if error.errno in (errno.ELOOP, errno.EOPNOTSUPP, errno.EINVAL):
                return (
                    f"{directory} lies on overlayfs or another stacked file system: move cache_dir to a disk"
                )
            return f"the kernel refused a file of {directory}: {error.strerror}"
        return ""
