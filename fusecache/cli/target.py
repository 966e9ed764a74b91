"""Finds the mount that a command is about, and calls its daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusecache.config.model import default_runtime_dir
from fusecache.control import client, mounts
from fusecache.errors import ControlError, DaemonUnreachableError, MountError


def require_mount(path: str) -> mounts.Mount:
    """The fusecache mount at `path`. Raises MountError when there is none."""
    found = mounts.find_mount(path)
    if found is None:
        raise MountError(f"{path} is not a fusecache mountpoint{mounts.containing_mount_hint(path)}")
    return found


def require_containing_mount(path: str) -> tuple[mounts.Mount, str]:
    """The fusecache mount that `path` lies in, and the path below its root. Raises MountError."""
    found = mounts.find_containing_mount(path)
    if found is None:
        raise MountError(f"{path} is not inside a fusecache mount")
    return found


def require_only_mount(mountpoint: str | None) -> mounts.Mount:
    """The mount at `mountpoint`, or the only one of this machine. Raises MountError where there are more, or none."""
    if mountpoint is not None:
        return require_mount(mountpoint)
    found = mounts.list_mounts()
    if not found:
        raise MountError("nothing is mounted: fusecache mount SOURCE MOUNTPOINT")
    if len(found) > 1:
        raise MountError(f"name one of the mounts: {', '.join(str(m.mountpoint) for m in found)}")
    return found[0]


def call_mount_daemon(mount: mounts.Mount, op: str, /, *, timeout: float = 30.0, **args: Any) -> Any:
    """The result of an operation of the mount's daemon; blocks for at most `timeout` seconds. Raises ControlError and
    DaemonUnreachableError, which name the mountpoint."""
    socket: Path = mounts.find_control_socket(mount, default_runtime_dir())
    try:
        return client.call_daemon(socket, op, timeout=timeout, **args)
    except DaemonUnreachableError as error:
        raise DaemonUnreachableError(
            f"{mount.mountpoint}: {error}: if it does not come back, "
            f"fusecache umount {mount.mountpoint} and mount again"
        ) from None
    except ControlError as error:
        raise ControlError(f"{mount.mountpoint}: {error}") from None
