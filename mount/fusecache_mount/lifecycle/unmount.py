"""The work of `fusecache umount`: unmount cleanly, also when the daemon or its keeper is gone.

A mount with open files is busy: it stays, and the error names the processes that use it. `--lazy` takes the mount away
all the same, and the open files go on until they are closed. A mount that no daemon serves any more is aborted first,
so that the processes that wait for it get an error.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event

from fusecache.config.model import default_runtime_dir
from fusecache.control import client, mounts
from fusecache.control.mountinfo import find_file_system
from fusecache.errors import ControlError, FusecacheError, MountError
from fusecache_mount.kernel.syscalls import wait_for_exit
from fusecache_mount.lifecycle import fuse_mount
from fusecache_mount.lifecycle.keeper_files import find_keeper_by_connection
from fusecache_mount.lifecycle.launch import statfs_errno

_BUSY_RETRY_TIMEOUT = 1.0
"""Seconds during which a busy mount is tried again: a scanner or a shell completion closes its files by itself."""
_BUSY_RETRY_PAUSE = 0.05
_SIGTERM_TIMEOUT = 15.0
"""Seconds that a keeper gets after SIGTERM; longer than its own deadline for killing its daemon."""
_MAX_NAMED_PROCESSES = 5


def unmount_and_wait(path: str, *, lazy: bool, timeout: float) -> None:
    """Unmount a fusecache mount and wait at most `timeout` seconds for its keeper to end. Raises MountError."""
    until = time.monotonic() + timeout
    mount = mounts.find_mount(path)
    if mount is None:
        raise MountError(_explain_not_mounted(path))
    connection = fuse_mount.connection_number(mount.device_number)
    pid = find_keeper_by_connection(connection)
    if pid is None:
        _unmount_without_keeper(mount, connection, lazy=lazy)
        return
    if lazy:
        with contextlib.suppress(ControlError):
            socket = mounts.find_control_socket(mount, default_runtime_dir())
            client.call_daemon(socket, "drain", timeout=max(0.1, timeout))
        used = any(find_processes_using(mount.mountpoint, mount.device_number))
        _unmount_lazily(mount.mountpoint)
        if not used:
            # not an error at the deadline: a process that this user can't see has a file open
            wait_for_exit(pid, max(0.0, until - time.monotonic()))
        return
    _unmount_retrying_busy(mount, min(_BUSY_RETRY_TIMEOUT, timeout))
    _wait_for_keeper(pid, mount.mountpoint, until)


def _explain_not_mounted(path: str) -> str:
    if not os.path.lexists(path):
        return f"{path} does not exist"
    real = mounts.resolve_mountpoint(path)
    around, kind = find_file_system(real)
    if around == real and real != Path("/"):
        return f"{path} is a mount of type {kind}, not of fusecache: umount {path}"
    return f"{path} is not mounted{mounts.containing_mount_hint(path)}"


def _unmount_retrying_busy(mount: mounts.Mount, grace: float) -> None:
    until = time.monotonic() + grace
    pause = Event()
    while True:
        try:
            fuse_mount.unmount(mount.mountpoint)
            return
        except OSError as error:
            if error.errno == errno.EBUSY and time.monotonic() < until:
                pause.wait(_BUSY_RETRY_PAUSE)
                continue
            raise _make_mount_error(error, mount.mountpoint, mount.device_number) from None


def _unmount_without_keeper(mount: mounts.Mount, connection: int, *, lazy: bool) -> None:
    """Unmount where no keeper is found. It may live in another container, where the mount goes on: abort only a mount
    that does not answer."""
    number = statfs_errno(mount.mountpoint)
    dead = number == errno.ENOTCONN or (number is None and lazy)
    if dead:
        fuse_mount.abort_connection(connection)
    try:
        fuse_mount.unmount(mount.mountpoint, lazy=lazy, force=dead and os.geteuid() == 0)
    except OSError as error:
        raise _make_mount_error(error, mount.mountpoint, mount.device_number) from None


def _unmount_lazily(mountpoint: Path) -> None:
    try:
        fuse_mount.unmount(mountpoint, lazy=True)
    except OSError as error:
        raise _make_mount_error(error, mountpoint, "") from None


def _make_mount_error(error: OSError, mountpoint: Path, device_number: str) -> MountError:
    if error.errno == errno.EBUSY:
        named = [f"{name} ({pid})" for pid, name in find_processes_using(mountpoint, device_number)]
        more = f" and {len(named) - _MAX_NAMED_PROCESSES} more" if len(named) > _MAX_NAMED_PROCESSES else ""
        by = (
            ", ".join(named[:_MAX_NAMED_PROCESSES]) + more
            if named
            else "processes that this user may not see"
        )
        return MountError(
            f"{mountpoint} is busy: in use by {by}: end them, or fusecache umount --lazy {mountpoint}"
        )
    if error.errno in (errno.EPERM, errno.EACCES):
        return MountError(f"{mountpoint}: not permitted: unmount as root or as the user who mounted it")
    if error.errno == errno.EINVAL:
        return MountError(f"{mountpoint} is not mounted any more")
    return MountError(f"{mountpoint}: {error.strerror}")


def _wait_for_keeper(keeper_pid: int, mountpoint: Path, until: float) -> None:
    if wait_for_exit(keeper_pid, max(0.0, until - time.monotonic())):
        return
    # It is unmounted, has no open file, and its keeper lives: the daemon is stuck. The keeper kills it after SIGTERM.
    with contextlib.suppress(ProcessLookupError):
        os.kill(keeper_pid, signal.SIGTERM)
    if not wait_for_exit(keeper_pid, _SIGTERM_TIMEOUT):
        raise MountError(f"{mountpoint} is unmounted, but its keeper did not end: kill -9 {keeper_pid}")


def find_processes_using(mountpoint: Path, device_number: str) -> Iterator[tuple[int, str]]:
    """(pid, name) of each process with a file, a directory or a mapping of this mount in use. Reads only links and
    tables of /proc: a look at the files could hang."""
    for name in sorted((name for name in os.listdir("/proc") if name.isdecimal()), key=int):
        if int(name) in (os.getpid(), os.getppid()):
            continue  # this command, with descriptors from its shell
        directory = Path("/proc", name)
        try:
            if _process_uses_mount(directory, str(mountpoint), device_number):
                yield int(name), (directory / "comm").read_text("utf-8", "replace").strip()
        except OSError:
            continue  # it has ended, or is somebody else's


def _process_uses_mount(process_dir: Path, mountpoint: str, device_number: str) -> bool:
    links = [process_dir / "cwd", process_dir / "root"]
    with contextlib.suppress(OSError):
        links += list((process_dir / "fd").iterdir())
    for link in links:
        with contextlib.suppress(OSError):
            target = os.readlink(link)
            if target == mountpoint or target.startswith(mountpoint.rstrip("/") + "/"):
                return True
    major, _, minor = device_number.partition(":")
    if not minor:
        return False
    column = f"{int(major):02x}:{int(minor):02x}"
    lines = (process_dir / "maps").read_text("utf-8", "replace").splitlines()
    return any(fields[3] == column for line in lines if len(fields := line.split(maxsplit=5)) > 4)


def main(arguments: Sequence[str] | None = None) -> int:
    """Unmount; returns the exit status."""
    parser = argparse.ArgumentParser(prog="fusecache-unmount")
    parser.add_argument("mountpoint")
    parser.add_argument("--lazy", action="store_true")
    parser.add_argument("--timeout", type=float, default=10.0)
    given = parser.parse_args(arguments)
    try:
        unmount_and_wait(given.mountpoint, lazy=given.lazy, timeout=given.timeout)
    except KeyboardInterrupt:
        print("fusecache: interrupted", file=sys.stderr)
        return 130
    except FusecacheError as error:
        print(f"fusecache: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"fusecache: umount: {error.filename or ''} {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
