"""Which fusecache mounts this machine has, and where their daemons listen.

The mounts come from the mount table: nothing in here looks at a mountpoint itself, which could hang when its daemon is
gone.

    <runtime_dir>/<mount_id>/control.sock     the daemon's control socket
    <runtime_dir>/<mount_id>/log              its log, unless log_file says otherwise
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from fusecache.control.mountinfo import FSTYPE, MOUNTINFO, read_mountinfo
from fusecache.errors import MountError

SOCKET_NAME = "control.sock"
LOG_NAME = "log"


@dataclass(frozen=True)
class Mount:
    """One fusecache mount. `device_number` is "major:minor"; `user_id` is the uid of the user who mounted it."""

    mountpoint: Path
    source: str
    device_number: str
    user_id: int


def list_mounts(mountinfo: Path = MOUNTINFO) -> list[Mount]:
    """All fusecache mounts in this mount namespace; of several on one mountpoint, the one on top."""
    found: dict[Path, Mount] = {}
    for line in read_mountinfo(mountinfo):
        found.pop(line.mountpoint, None)
        if line.fstype == FSTYPE:
            found[line.mountpoint] = Mount(line.mountpoint, line.source, line.device_number, line.user_id)
    return list(found.values())


def resolve_mountpoint(path: str | Path, mountinfo: Path = MOUNTINFO) -> Path:
    """The absolute real path of a mountpoint. Resolves its parents only if the path is no mount of ours:
    an lstat of a mountpoint whose daemon is gone hangs or fails."""
    plain = Path(os.path.abspath(path))
    known = {mount.mountpoint for mount in list_mounts(mountinfo)}
    if plain in known or plain == plain.parent:
        return plain
    below = Path(os.path.realpath(plain.parent), plain.name)
    return below if below in known else Path(os.path.realpath(below))


def find_mount(path: str | Path, mountinfo: Path = MOUNTINFO) -> Mount | None:
    """The fusecache mount whose mountpoint is `path`."""
    wanted = resolve_mountpoint(path, mountinfo)
    return next((mount for mount in list_mounts(mountinfo) if mount.mountpoint == wanted), None)


def find_containing_mount(path: str | Path, mountinfo: Path = MOUNTINFO) -> tuple[Mount, str] | None:
    """The fusecache mount that `path` lies in, and the path below its root ("" for the root)."""
    plain = Path(os.path.abspath(path))
    known = {mount.mountpoint: mount for mount in list_mounts(mountinfo)}
    for parent in (plain, *plain.parents):
        for candidate in (parent, Path(os.path.realpath(parent.parent), parent.name)):
            if candidate in known:
                below = plain.relative_to(parent)
                return known[candidate], "" if below == Path() else str(below)
    return None


def containing_mount_hint(path: str | Path) -> str:
    """The end of a message about `path`, which is no mountpoint: that it lies in a mount; empty if it does not."""
    around = find_containing_mount(path)
    return f": it lies in the mount {around[0].mountpoint}" if around else ""


def compute_mount_id(mountpoint: Path) -> str:
    """The name of a mount's folder below the runtime directory: 16 hex digits that stand for its real path."""
    return xxhash.xxh3_64_hexdigest(os.fsencode(mountpoint))


def control_socket_path(runtime_dir: Path, mountpoint: Path) -> Path:
    """The path of the socket at which the daemon of `mountpoint` (a real path) listens."""
    return runtime_dir / compute_mount_id(mountpoint) / SOCKET_NAME


def serve_mountpoint(node: str) -> Path:
    """The path that stands for the mountpoint of a node that serves without a mount."""
    return Path("/fusecache-serve") / node


def find_control_socket(mount: Mount, default_runtime_dir: Path, env: Mapping[str, str] = os.environ) -> Path:
    """The control socket of a mount: below $FUSECACHE_RUNTIME_DIR, `default_runtime_dir`, which is that of this user,
    or the runtime directory of the user who mounted. The first of these paths where no socket is found."""
    candidates = [
        default_runtime_dir,
        Path(f"/run/user/{mount.user_id}/fusecache"),
        Path(f"/tmp/fusecache-{mount.user_id}"),  # noqa: S108  its owner is checked below
        Path("/run/fusecache"),
    ]
    if chosen := env.get("FUSECACHE_RUNTIME_DIR"):
        candidates.insert(0, Path(os.path.abspath(chosen)))
    sockets = [control_socket_path(directory, mount.mountpoint) for directory in candidates]
    trusted = (0, os.geteuid(), mount.user_id)
    return next((socket for socket in sockets if _is_socket_owned_by(socket, trusted)), sockets[0])


def _is_socket_owned_by(path: Path, owners: tuple[int, ...]) -> bool:
    """Whether a socket of one of these users is there: in /tmp, anybody may have made the folder first."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISSOCK(found.st_mode) and found.st_uid in owners


def make_private_directory(directory: Path) -> Path:
    """Make `directory` with mode 0700, or check that it is ours. Raises MountError: in a shared place such as
    /tmp, another user may have put one there."""
    try:
        directory.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            found = directory.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                raise MountError(
                    f"{directory} belongs to somebody else: remove it or set runtime_dir"
                ) from None
            if found.st_mode & 0o077:
                directory.chmod(0o700)
    except OSError as error:
        raise MountError(f"runtime directory {directory}: {error.strerror}: set runtime_dir") from error
    return directory


def make_mount_runtime_dir(runtime_dir: Path, mountpoint: Path) -> Path:
    """Make the runtime folder of one mount, private to this user. Raises MountError."""
    try:
        found = runtime_dir.lstat()
    except FileNotFoundError:
        make_private_directory(runtime_dir)
    else:
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (0, os.geteuid()):
            raise MountError(f"{runtime_dir} belongs to somebody else: remove it or set runtime_dir")
    return make_private_directory(runtime_dir / compute_mount_id(mountpoint))
