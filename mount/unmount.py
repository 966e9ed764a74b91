"""The work of `fusecache umount`: unmount cleanly, also when the daemon or its keeper is gone.

A mount with open files is busy: nothing changes, and the error names who has them open. `--lazy` takes the mount
away all the same; what is open goes on until it is closed. A mount that nobody serves any more is aborted first, so
that who waits for it gets an error.
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

from fusecache import control, mounts
from fusecache.errors import ControlError, FusecacheError, MountError
from fusecache.mount import keeper, mounting
from fusecache.mount.launch import look, wait_for_end

_GRACE = 1.0
"""Seconds in which a mount that is busy is tried again: a scanner or a shell completion lets go by itself."""
_PAUSE = 0.05
_KILL = 15.0
"""Seconds after SIGTERM: above the deadline at which the keeper kills its daemon."""
_MOST_NAMED = 5


def unmount(path: str, *, lazy: bool, timeout: float) -> None:
    """Unmount a fusecache mount and wait at most `timeout` seconds for its keeper to end. Raises MountError."""
    until = time.monotonic() + timeout
    mount = mounts.find_mount(path)
    if mount is None:
        raise MountError(_why_not(path))
    connection = int(mount.device.partition(":")[2])
    pid = keeper.find_keeper(connection)
    if pid is None:
        _unmount_unkept(mount, connection, lazy=lazy)
        return
    if lazy:
        with contextlib.suppress(ControlError):
            control.call(mounts.find_socket(mount), "drain", timeout=max(0.1, timeout))
        used = any(holders(mount.mountpoint, mount.device))
        _unmount(mount.mountpoint)
        if not used:
            # not an error in the end: somebody whom this user can't see has a file open
            wait_for_end(pid, max(0.0, until - time.monotonic()))
        return
    _unmount_when_free(mount, min(_GRACE, timeout))
    _wait(pid, mount.mountpoint, until)


def _why_not(path: str) -> str:
    if not os.path.lexists(path):
        return f"{path} does not exist"
    real = mounts.real_mountpoint(path)
    around, kind = mounts.mount_at(real)
    if around == real and real != Path("/"):
        return f"{path} is a mount of type {kind}, not of fusecache: umount {path}"
    inside = mounts.containing_mount(path)
    hint = f": it lies in the mount {inside[0].mountpoint}" if inside else ""
    return f"{path} is not mounted{hint}"


def _unmount_when_free(mount: mounts.Mount, grace: float) -> None:
    until = time.monotonic() + grace
    pause = Event()
    while True:
        try:
            mounting.unmount(mount.mountpoint)
            return
        except OSError as error:
            if error.errno == errno.EBUSY and time.monotonic() < until:
                pause.wait(_PAUSE)
                continue
            raise _explained(error, mount.mountpoint, mount.device) from None


def _unmount_unkept(mount: mounts.Mount, connection: int, *, lazy: bool) -> None:
    """No keeper to be seen. It may live in another container, where the mount goes on: abort nothing that answers."""
    number = look(mount.mountpoint)
    dead = number == errno.ENOTCONN or (number is None and lazy)
    if dead:
        mounting.abort(connection)
    try:
        mounting.unmount(mount.mountpoint, lazy=lazy, force=dead and os.geteuid() == 0)
    except OSError as error:
        raise _explained(error, mount.mountpoint, mount.device) from None


def _unmount(mountpoint: Path) -> None:
    try:
        mounting.unmount(mountpoint, lazy=True)
    except OSError as error:
        raise _explained(error, mountpoint, "") from None


def _explained(error: OSError, mountpoint: Path, device: str) -> MountError:
    if error.errno == errno.EBUSY:
        named = [f"{name} ({pid})" for pid, name in holders(mountpoint, device)]
        more = f" and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
        by = ", ".join(named[:_MOST_NAMED]) + more if named else "processes that this user may not see"
        return MountError(
            f"{mountpoint} is busy: in use by {by}: end them, or fusecache umount --lazy {mountpoint}"
        )
    if error.errno in (errno.EPERM, errno.EACCES):
        return MountError(f"{mountpoint}: not permitted: unmount as root or as the user who mounted it")
    if error.errno == errno.EINVAL:
        return MountError(f"{mountpoint} is not mounted any more")
    return MountError(f"{mountpoint}: {error.strerror}")


def _wait(pid: int, mountpoint: Path, until: float) -> None:
    if wait_for_end(pid, max(0.0, until - time.monotonic())):
        return
    # Unmounted without an open file, and still there: it is stuck. After SIGTERM it kills the daemon in the end.
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    if not wait_for_end(pid, _KILL):
        raise MountError(f"{mountpoint} is unmounted, but its keeper did not end: kill -9 {pid}")


def holders(mountpoint: Path, device: str) -> Iterator[tuple[int, str]]:
    """(pid, name) of the processes with a file, a directory or a mapping of this mount in use. Reads links and tables
    of /proc only: looking at the files could hang."""
    for name in sorted((name for name in os.listdir("/proc") if name.isdecimal()), key=int):
        if int(name) in (os.getpid(), os.getppid()):
            continue  # this command, with descriptors from its shell
        directory = Path("/proc", name)
        try:
            if _holds(directory, str(mountpoint), device):
                yield int(name), (directory / "comm").read_text("utf-8", "replace").strip()
        except OSError:
            continue  # it has ended, or is somebody else's


def _holds(directory: Path, mountpoint: str, device: str) -> bool:
    links = [directory / "cwd", directory / "root"]
    with contextlib.suppress(OSError):
        links += list((directory / "fd").iterdir())
    for link in links:
        with contextlib.suppress(OSError):
            target = os.readlink(link)
            if target == mountpoint or target.startswith(mountpoint.rstrip("/") + "/"):
                return True
    major, _, minor = device.partition(":")
    if not minor:
        return False
    column = f"{int(major):02x}:{int(minor):02x}"
    lines = (directory / "maps").read_text("utf-8", "replace").splitlines()
    return any(fields[3] == column for line in lines if len(fields := line.split(maxsplit=5)) > 4)


def main(arguments: Sequence[str] | None = None) -> int:
    """Unmount; returns the exit status."""
    parser = argparse.ArgumentParser(prog="fusecache-unmount")
    parser.add_argument("mountpoint")
    parser.add_argument("--lazy", action="store_true")
    parser.add_argument("--timeout", type=float, default=10.0)
    given = parser.parse_args(arguments)
    try:
        unmount(given.mountpoint, lazy=given.lazy, timeout=given.timeout)
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
