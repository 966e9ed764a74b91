"""Settings of a mount that the kernel is told anew while it is served: read-ahead, and whether to refuse writes."""

from __future__ import annotations

from pathlib import Path

from fusecache.errors import MountError
from fusecache_mount.lifecycle import fuse_mount, mounting


class MountSettings:
    """The settings of the fusecache mount on top at `mountpoint`; `read_ahead` in bytes is the configured one. Holds no
    state: the kernel does."""

    def __init__(self, mountpoint: Path, read_ahead: int) -> None:
        self._mountpoint = mountpoint
        self._read_ahead_bytes = read_ahead

    def device_number(self) -> str:
        """The "major:minor" of the mount. Raises MountError if it is not mounted."""
        found = fuse_mount.device_number_of(self._mountpoint)
        if found is None:
            raise MountError(f"{self._mountpoint} is not mounted")
        return found

    def disable_read_ahead(self) -> None:
        """Have the kernel ask for what is read, and for nothing else. Raises OSError, and MountError if it is not
        mounted."""
        mounting.set_read_ahead(self._mountpoint, 0)

    def restore_read_ahead(self) -> None:
        """Have the kernel read ahead as configured. Raises OSError, and MountError if it is not mounted."""
        mounting.set_read_ahead(self._mountpoint, self._read_ahead_bytes)

    def pass_writes(self) -> None:
        """Have the kernel pass changes to the daemon, which refuses them. May block on the daemon. Raises OSError."""
        mounting.set_writable(self._mountpoint, writable=True)

    def refuse_writes(self) -> None:
        """Have the kernel refuse changes itself, if it does not. May block on the daemon. Raises OSError."""
        if fuse_mount.is_writable(self._mountpoint):
            mounting.set_writable(self._mountpoint, writable=False)
