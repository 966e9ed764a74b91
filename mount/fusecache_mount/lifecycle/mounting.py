"""System calls of mounting: /dev/fuse and mount(2) with our own descriptor, its clones, unmounting, aborting.

With CAP_SYS_ADMIN the device is opened and mounted here; without it the setuid program fusermount3 does both and
sends the descriptor back. Nothing in here looks at a mountpoint itself, which could hang: mounts are read from
/proc/self/mountinfo. Imports the standard library only, because the keeper lives on it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusecache.errors import MountError
from fusecache_mount.kernel import syscalls
from fusecache_mount.kernel.protocol import MAX_READ_PAGES, PAGE_BYTES
from fusecache_mount.kernel.syscalls import MountFlag, UnmountFlag

FSTYPE = "fuse.fusecache"
MAX_READ_BYTES = MAX_READ_PAGES * PAGE_BYTES

LIMITED_READ_AHEAD_BYTES = 1016 << 10
"""Bytes: one READ, as large as it comes. The kernel asks for half of that around a fault and twice as much behind a
reader, so that little is taken for read that is not; with 8 MiB a tensor of 8 MiB looks like one of 24. Warm reads
through the daemon are as fast with it (2.5 GB/s), those of a file that arrives at full speed lose some 5 %."""

_MOUNT_FLAGS = MountFlag.NOSUID | MountFlag.NODEV | MountFlag.NOATIME
_MOUNTINFO = "/proc/self/mountinfo"
_PROGRAM_PATH = "/usr/bin:/bin:/usr/local/bin:/usr/sbin:/sbin"
"""Where to look for fusermount3 besides PATH, which may be empty under mount(8)."""
_FUSERMOUNT_SECONDS = 30.0


@dataclass(frozen=True)
class NewMount:
    """A new mount. `connection` is the kernel's number of it; `why` says what `privileged` False comes from."""

    device_fd: int
    connection: int
    is_privileged: bool
    unprivileged_reason: str


@dataclass(frozen=True)
class MountInfoLine:
    """One line of mountinfo; `device` is "major:minor", `options` are those of this mount and of its file system."""

    mountpoint: str
    device_number: str
    fstype: str
    options: frozenset[str] = frozenset()


def read_mountinfo(path: str = _MOUNTINFO) -> list[MountInfoLine]:
    """All mounts of this mount namespace, a mount that covers another one after it."""
    found = []
    with open(path, "rb") as file:
        for line in file.read().splitlines():
            before, separator, after = line.partition(b" - ")
            fields = before.split(b" ")
            if separator and len(fields) >= 6:
                mountpoint = os.fsdecode(_unescape(fields[4]))
                kind, _, *rest = after.split(b" ")
                options = b",".join((fields[5], *rest)).decode("utf-8", "replace").split(",")
                found.append(MountInfoLine(mountpoint, fields[2].decode(), kind.decode(), frozenset(options)))
    return found


def _unescape(text: bytes) -> bytes:
    """mountinfo writes space, tab, newline and backslash as three octal digits."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), text)


def device_number_of(mountpoint: Path | str) -> str | None:
    """The "major:minor" of the fusecache mount on top at a real path; None when there is none."""
    found = [line for line in read_mountinfo() if line.mountpoint == str(mountpoint)]
    return found[-1].device_number if found and found[-1].fstype == FSTYPE else None


def is_writable(mountpoint: Path | str) -> bool:
    """Whether the kernel hands changes of the mount on top at a real path to its daemon, which refuses them."""
    found = [line for line in read_mountinfo() if line.mountpoint == str(mountpoint)]
    return bool(found) and found[-1].fstype == FSTYPE and "ro" not in found[-1].options


def set_writable(mountpoint: Path, *, writable: bool) -> None:
    """Have the kernel hand changes on, or refuse them itself. May block on the daemon. Raises OSError."""
    syscalls.remount(mountpoint, _MOUNT_FLAGS | (MountFlag(0) if writable else MountFlag.RDONLY))


def is_mounted(mountpoint: Path | str, connection: int | None = None) -> bool:
    """Whether a fusecache mount (this very one, if its connection is given) is on top at a real path."""
    device = device_number_of(mountpoint)
    return device is not None and connection in (None, int(device.partition(":")[2]))


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
    return NewMount(device, int(number.partition(":")[2]), privileged, why)


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


def _find_fusermount() -> str | None:
    for name in ("fusermount3", "fusermount"):
        found = shutil.which(name) or shutil.which(name, path=_PROGRAM_PATH)
        if found:
            return found
    return None


def _mount_by_fusermount(source: str, mountpoint: Path, allow_other: bool, reason: str) -> int:
    program = _find_fusermount()
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
                env={"PATH": _PROGRAM_PATH, "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_FUSERMOUNT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise MountError(f"{program} did not end within {_FUSERMOUNT_SECONDS:g} s") from None
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()
            text = said[0].partition(": ")[2] or said[0] if said else f"exit status {done.returncode}"
            raise MountError(f"mount {mountpoint}: {reason}, and {os.path.basename(program)} says: {text}")
        theirs.close()
        ours.settimeout(_FUSERMOUNT_SECONDS)
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
    """Let the kernel read `size` bytes ahead on this mount, 0: only what is asked for. Files that are open keep what
    they have. Raises OSError, and MountError if it is not mounted."""
    device = device_number_of(mountpoint)
    if device is None:
        raise MountError(f"{mountpoint} is not mounted")
    kib = max(1, size >> 10) if size else 0
    syscalls.write_read_ahead(device, kib)


class KernelReadAhead:
    """How far the kernel reads ahead, as it is when a file is opened: it takes that over into the open file. `size` in
    bytes is for most files; little, READ_AHEAD_LITTLE, for those whose readers are listened to."""

    def __init__(self, mountpoint: Path, size: int) -> None:
        self._mountpoint = mountpoint
        self._size_bytes = size
        self._is_limited = False

    def set_limited(self, is_limited: bool) -> None:
        """For the files that are opened from now on. Fails silently: it stays as it is then."""
        if is_limited != self._is_limited and self._size_bytes > LIMITED_READ_AHEAD_BYTES:
            with contextlib.suppress(OSError, MountError):
                set_read_ahead(self._mountpoint, LIMITED_READ_AHEAD_BYTES if is_limited else self._size_bytes)
                self._is_limited = is_limited


def abort_connection(connection: int) -> bool:
    """Fail all requests of a connection, also future ones, so that no process waits for it. False: the control
    file is not there (fusectl is not mounted) or not ours; then MNT_FORCE or closing the device has to do."""
    try:
        syscalls.abort_connection(connection)
    except OSError:
        return False
    return True


def unmount(mountpoint: Path, *, lazy: bool = False, force: bool = False) -> None:
    """Unmount what is on top at a real path. `lazy`: now for new users, and for the others when they close their
    files; `force`: fail the requests under way, too. Raises OSError: EBUSY, EINVAL (not mounted), EPERM."""
    flags = UnmountFlag.NOFOLLOW
    if lazy:
        flags |= UnmountFlag.DETACH
    if force:
        flags |= UnmountFlag.FORCE
    try:
        syscalls.umount2(mountpoint, flags)
        return
    except OSError as error:
        if error.errno != errno.EPERM or (program := _find_fusermount()) is None:
            raise
    _unmount_by_fusermount(
        [program, "-u", *(["-z"] if lazy else []), "--", os.fspath(mountpoint)], mountpoint
    )


def _unmount_by_fusermount(command: Sequence[str], mountpoint: Path) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            command,
            env={"PATH": _PROGRAM_PATH},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_FUSERMOUNT_SECONDS,
            check=False,
        )
        if done.returncode == 0:
            return
        said = done.stderr.decode("utf-8", "replace").lower()
        if "not found" in said or "not mounted" in said or "invalid argument" in said:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(mountpoint))
        if "busy" not in said:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(mountpoint))
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(mountpoint))
