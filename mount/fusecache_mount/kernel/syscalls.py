"""System calls around mounts that Python has no function for, and waiting for the end of a process. The standard
library only: the keeper lives on it.

Each function makes one call, and raises OSError with the call's errno. None looks at what is mounted, and none asks
another program for help.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
from enum import IntFlag
from pathlib import Path

FUSE_DEVICE = "/dev/fuse"

_IOC_CLONE = 0x8004E500
"""FUSE_DEV_IOC_CLONE."""
_PR_SET_PDEATHSIG = 1
_CONNECTIONS = "/sys/fs/fuse/connections"

_libc = ctypes.CDLL(None, use_errno=True)


class MountFlag(IntFlag):
    """MS_* of mount(2)."""

    RDONLY = 1
    NOSUID = 2
    NODEV = 4
    REMOUNT = 32
    NOATIME = 1024


class UnmountFlag(IntFlag):
    """MNT_* and UMOUNT_* of umount2(2)."""

    FORCE = 1
    DETACH = 2
    NOFOLLOW = 8


def _raise_errno(path: Path) -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), str(path))


def mount_filesystem(source: str, mountpoint: Path, fstype: str, flags: MountFlag, options: str) -> None:
    """mount(2) of a new file system at `mountpoint`; `source` is what the mount table will show. May block on a
    daemon that serves a directory above."""
    arguments = (os.fsencode(source), os.fsencode(mountpoint), fstype.encode(), int(flags), options.encode())
    if _libc.mount(*arguments) != 0:
        _raise_errno(mountpoint)


def remount(mountpoint: Path, flags: MountFlag) -> None:
    """Give the mount on top at `mountpoint` these flags. May block on its daemon."""
    if _libc.mount(None, os.fsencode(mountpoint), None, int(flags | MountFlag.REMOUNT), None) != 0:
        _raise_errno(mountpoint)


def umount2(mountpoint: Path, flags: UnmountFlag) -> None:
    """Unmount what is on top at `mountpoint`. Raises OSError: EBUSY, EINVAL (not mounted), EPERM."""
    if _libc.umount2(os.fsencode(mountpoint), int(flags)) != 0:
        _raise_errno(mountpoint)


def open_fuse_device() -> int:
    """A descriptor of /dev/fuse that belongs to no connection yet, closed on exec."""
    return os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)


def clone_device(device_fd: int) -> int:
    """One more descriptor of the connection behind `device_fd`, with a queue of its own."""
    clone = open_fuse_device()
    try:
        fcntl.ioctl(clone, _IOC_CLONE, struct.pack("=I", device_fd))
    except OSError:
        os.close(clone)
        raise
    return clone


def abort_connection(connection: int) -> None:
    """Fail all requests of a connection, also those to come. Raises OSError where the control file is not there
    (fusectl is not mounted) or belongs to another user."""
    with open(f"{_CONNECTIONS}/{connection}/abort", "w", encoding="ascii") as file:
        file.write("1")


def write_read_ahead(device_number: str, kib: int) -> None:
    """Let the kernel read `kib` KiB ahead on the mount with this "major:minor". Files that are open keep what they
    have."""
    Path(f"/sys/class/bdi/{device_number}/read_ahead_kb").write_text(f"{kib}\n", encoding="ascii")


def set_parent_death_signal(signal_number: int) -> None:
    """Have the kernel send this process a signal when its parent ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)


def wait_for_exit(pid: int, timeout: float) -> bool:
    """Wait at most `timeout` seconds for the end of a process, a child or not; returns whether it has ended. A child is
    not reaped. Raises OSError where there is no descriptor to spare."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(int(timeout * 1000)))
    finally:
        os.close(fd)
