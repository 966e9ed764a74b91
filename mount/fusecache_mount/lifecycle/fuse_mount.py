"""The FUSE connection of a mount: found in the mount table, unmounted, aborted.

Nothing in here looks at a mountpoint itself, which could hang. Standard library only, because the keeper lives on it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from fusecache.control.mountinfo import FSTYPE, MountInfoLine, find_top_mount
from fusecache_mount.kernel import syscalls
from fusecache_mount.kernel.syscalls import UnmountFlag

PROGRAM_PATH = "/usr/bin:/bin:/usr/local/bin:/usr/sbin:/sbin"
"""Where fusermount3 is looked for besides PATH, which may be empty under mount(8)."""
FUSERMOUNT_TIMEOUT = 30.0
"""Seconds."""


def device_number_of(mountpoint: Path | str) -> str | None:
    """The "major:minor" of the fusecache mount on top at a real path; None where no such mount is on top."""
    found = _find_our_mount(mountpoint)
    return None if found is None else found.device_number


def connection_number(device_number: str) -> int:
    """The kernel's number of a connection, which is the minor number of its mount's device."""
    return int(device_number.partition(":")[2])


def is_writable(mountpoint: Path | str) -> bool:
    """Whether the kernel passes changes of the mount on top at a real path to its daemon, which refuses them."""
    found = _find_our_mount(mountpoint)
    return found is not None and "ro" not in found.options


def is_mounted(mountpoint: Path | str, connection: int | None = None) -> bool:
    """Whether a fusecache mount (this very one, if its connection is given) is on top at a real path."""
    device_number = device_number_of(mountpoint)
    return device_number is not None and connection in (None, connection_number(device_number))


def abort_connection(connection: int) -> bool:
    """Fail all requests of a connection, also future ones, so that no process waits for it. Returns False when the
    control file is not there (fusectl is not mounted) or belongs to another user; then only MNT_FORCE or closing the
    device helps."""
    try:
        syscalls.abort_connection(connection)
    except OSError:
        return False
    return True


def unmount(mountpoint: Path, *, lazy: bool = False, force: bool = False) -> None:
    """Unmount the mount on top at a real path. With `lazy` no new user finds it, and the others keep it until they
    close their files; with `force` the requests under way fail. Blocks for at most FUSERMOUNT_TIMEOUT seconds where
    fusermount3 has to do it. Raises OSError: EBUSY, EINVAL (not mounted), EPERM."""
    flags = UnmountFlag.NOFOLLOW
    if lazy:
        flags |= UnmountFlag.DETACH
    if force:
        flags |= UnmountFlag.FORCE
    try:
        syscalls.umount2(mountpoint, flags)
        return
    except OSError as error:
        program = find_fusermount() if error.errno == errno.EPERM else None
        if program is None:
            raise
    _unmount_by_fusermount(
        [program, "-u", *(["-z"] if lazy else []), "--", os.fspath(mountpoint)], mountpoint
    )


def find_fusermount() -> str | None:
    """The path of the setuid program that mounts and unmounts for users without CAP_SYS_ADMIN."""
    for name in ("fusermount3", "fusermount"):
        found = shutil.which(name) or shutil.which(name, path=PROGRAM_PATH)
        if found:
            return found
    return None


def _find_our_mount(mountpoint: Path | str) -> MountInfoLine | None:
    found = find_top_mount(mountpoint)
    return found if found is not None and found.fstype == FSTYPE else None


def _unmount_by_fusermount(command: Sequence[str], mountpoint: Path) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            command,
            env={"PATH": PROGRAM_PATH},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=FUSERMOUNT_TIMEOUT,
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
