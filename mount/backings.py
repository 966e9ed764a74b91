"""The passthrough backings of the kernel: files that it reads by itself for a FUSE inode."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fusecache.mount import protocol

_log = logging.getLogger(__name__)


@dataclass
class Passthrough:
    """Whether passthrough is in use, and why, or why not, in words for the user."""

    active: bool
    why: str

    def refuse(self, why: str) -> None:
        """Fall back to the daemon for all opens to come; says so once in the log."""
        if self.active:
            self.active = False
            self.why = why
            _log.warning("passthrough is off: %s; reads go through the daemon", why)


class Backings:
    """Those of the connection of FUSE descriptor `device`. Thread-safe."""

    def __init__(self, device: int) -> None:
        self._device = device

    def open(self, fd: int) -> int:
        """Have the kernel keep the file behind this descriptor; returns the number to name it by. Raises OSError."""
        request = bytearray(protocol.BACKING_MAP.pack(fd, 0, 0))
        return int(fcntl.ioctl(self._device, protocol.IOC_BACKING_OPEN, request))

    def close(self, backing: int) -> None:
        """Let it go; what is open in the kernel goes on."""
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._device, protocol.IOC_BACKING_CLOSE, struct.pack("<I", backing))

    def refusal(self, directory: Path) -> str:
        """Why the kernel does not take files of this directory; '' if it does."""
        try:
            with tempfile.TemporaryFile(dir=directory) as file:
                self.close(self.open(file.fileno()))
        except OSError as error:
            if error.errno == errno.EPERM:
                return "it needs CAP_SYS_ADMIN: run the mount as root (in a container: --cap-add SYS_ADMIN)"
            if error.errno in (errno.ELOOP, errno.EOPNOTSUPP, errno.EINVAL):
                return (
                    f"{directory} lies on overlayfs or another stacked file system: move cache_dir to a disk"
                )
            return f"the kernel refused a file of {directory}: {error.strerror}"
        return ""
