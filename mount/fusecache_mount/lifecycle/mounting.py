"""Mounting: /dev/fuse and mount(2) with our own descriptor, its clones, and how the mount reads ahead.

With CAP_SYS_ADMIN this module opens and mounts the device; without it the setuid program fusermount3 does both and
sends the descriptor back. Nothing in here looks at a mountpoint itself, which could hang.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from fusecache.control.mountinfo import FSTYPE
from fusecache.errors import MountError
from fusecache_mount.kernel import syscalls
from fusecache_mount.kernel.protocol import MAX_READ_PAGES, PAGE_BYTES
from fusecache_mount.kernel.syscalls import MountFlag
from fusecache_mount.lifecycle.fuse_mount import (
    FUSERMOUNT_TIMEOUT,
    PROGRAM_PATH,
    connection_number,
    device_number_of,
    find_fusermount,
)

MAX_READ_BYTES = MAX_READ_PAGES * PAGE_BYTES

LIMITED_READ_AHEAD_BYTES = 1016 << 10
"""Bytes: one READ of the largest size. The kernel asks for half of that around a fault and twice as much behind a
reader, so that few bytes look read that no program read; with 8 MiB a tensor of 8 MiB looks like one of 24. Warm reads
through the daemon are as fast with it (2.5 GB/s), those of a file that arrives at full speed lose some 5 %."""

_MOUNT_FLAGS = MountFlag.NOSUID | MountFlag.NODEV | MountFlag.NOATIME


@dataclass(frozen=True)
class NewMount:
    """A new mount. `connection` is the kernel's number of it; `unprivileged_reason` is one line where `is_privileged`
    is False, and empty otherwise."""

    device_fd: int
    connection: int
    is_privileged: bool
    unprivileged_reason: str


def set_writable(mountpoint: Path, *, writable: bool) -> None:
    """Have the kernel pass changes on to the daemon, or refuse them itself. May block on the daemon. Raises OSError."""
    syscalls.remount(mountpoint, _MOUNT_FLAGS | (MountFlag(0) if writable else MountFlag.RDONLY))


def mount(source: str, mountpoint: Path, *, allow_other: bool) -> NewMount:
    """Mount a new connection, which nobody serves yet, at a real path. `source` is what the mount table will
    show. Raises MountError."""
    try:
        device = _mount_directly(source, mountpoint, allow_other)
        privileged, why = True, ""
    except PermissionError as error:
        device = _mount_by_fusermount(source, mountpoint, allow_other, str(error.strerror))
        privileged, why = False, "mounted without CAP_SYS_ADMIN, which passthrough needs: mount as root"
    number = device_number_of(mountpoint)
    if number is None:
        os.close(device)
        raise MountError(f"{mountpoint}: the mount went away at once: is somebody else unmounting it?")
    return NewMount(device, connection_number(number), privileged, why)


def _mount_directly(source: str, mountpoint: Path, allow_other: bool) -> int:
    """Raises PermissionError where fusermount3 may help, and MountError."""
    try:
        device = syscalls.open_fuse_device()
    except FileNotFoundError:
        path = syscalls.FUSE_DEVICE
        raise MountError(
            f"{path} is missing: modprobe fuse on the host, or start the container with --device {path}"
        ) from None
    except PermissionError:
        raise
    except OSError as error:
        raise MountError(
            f"{syscalls.FUSE_DEVICE}: {error.strerror}: modprobe fuse on the host, or allow the container the device"
        ) from None
    options = f"fd={device},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}"
    options += f",default_permissions,max_read={MAX_READ_BYTES}" + (",allow_other" if allow_other else "")
    try:
        syscalls.mount_filesystem(source, mountpoint, FSTYPE, _MOUNT_FLAGS | MountFlag.RDONLY, options)
    except OSError as error:
        os.close(device)
        if isinstance(error, PermissionError):
            raise
        if error.errno == errno.ENODEV:
            raise MountError("this kernel has no FUSE: modprobe fuse") from None
        raise MountError(f"mount {mountpoint}: {error.strerror}") from None
    return device


def _mount_by_fusermount(source: str, mountpoint: Path, allow_other: bool, reason: str) -> int:
    program = find_fusermount()
    if program is None:
        raise MountError(
            f"mount {mountpoint}: {reason}: needs root (CAP_SYS_ADMIN), or fusermount3: apt-get install fuse3"
        )
    name = source.replace("\\", "\\\\").replace(",", "\\,")
    options = f"ro,nosuid,nodev,noatime,default_permissions,max_read={MAX_READ_BYTES}"
    options += f",fsname={name},subtype={FSTYPE.partition('.')[2]}" + (",allow_other" if allow_other else "")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        try:
            done = subprocess.run(
                [program, "-o", options, "--", os.fspath(mountpoint)],
                env={"PATH": PROGRAM_PATH, "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=FUSERMOUNT_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise MountError(f"{program} did not end within {FUSERMOUNT_TIMEOUT:g} s") from None
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()
            text = said[0].partition(": ")[2] or said[0] if said else f"exit status {done.returncode}"
            raise MountError(f"mount {mountpoint}: {reason}, and {os.path.basename(program)} says: {text}")
        theirs.close()
        ours.settimeout(FUSERMOUNT_TIMEOUT)
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    if not descriptors:
        raise MountError(f"{program} sent no descriptor of the mount")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]


def clone_devices(device_fd: int, count: int) -> list[int]:
    """Up to `count` more descriptors of the same connection, each with a queue of its own; fewer where this user
    may not open the device."""
    clones: list[int] = []
    for _ in range(count):
        try:
            clones.append(syscalls.clone_device(device_fd))
        except OSError:
            break
    return clones


def set_read_ahead(mountpoint: Path, size: int) -> None:
    """Let the kernel read `size` bytes ahead on this mount; with 0 it reads only what a program asks for. Files that
    are open keep the value that they have. Raises OSError, and MountError if nothing is mounted there."""
    device = device_number_of(mountpoint)
    if device is None:
        raise MountError(f"{mountpoint} is not mounted")
    kib = max(1, size >> 10) if size else 0
    syscalls.write_read_ahead(device, kib)


class KernelReadAhead:
    """How far the kernel reads ahead; it takes the value into a file when the file is opened. `size` in bytes is for
    most files; LIMITED_READ_AHEAD_BYTES is for the files whose readers the prefetcher observes."""

    def __init__(self, mountpoint: Path, size: int) -> None:
        self._mountpoint = mountpoint
        self._size_bytes = size
        self._is_limited = False

    def set_limited(self, is_limited: bool) -> None:
        """Limit the read-ahead, or not, of the files that are opened from now on. Where the kernel refuses, the value
        stays as it is, and nothing is raised."""
        if is_limited != self._is_limited and self._size_bytes > LIMITED_READ_AHEAD_BYTES:
            with contextlib.suppress(OSError, MountError):
                set_read_ahead(self._mountpoint, LIMITED_READ_AHEAD_BYTES if is_limited else self._size_bytes)
                self._is_limited = is_limited
