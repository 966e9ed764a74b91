"""The mount table: /proc/self/mountinfo, parsed. Standard library only, because the keeper lives on it.

Reading it never looks at a mountpoint, which could hang when its daemon is gone.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

FSTYPE = "fuse.fusecache"
MOUNTINFO = Path("/proc/self/mountinfo")
_OCTAL_ESCAPE = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True)
class MountInfoLine:
    """One mount of this mount namespace. `device_number` is "major:minor"; `options` are those of the mount and of its
    file system together; `user_id` is the uid of the user who made a FUSE mount, 0 for other file systems."""

    mountpoint: Path
    device_number: str
    fstype: str
    source: str
    options: frozenset[str] = frozenset()
    user_id: int = 0


def read_mountinfo(path: Path | str = MOUNTINFO) -> list[MountInfoLine]:
    """All mounts in the kernel's order: a mount that covers another one stands after it. Lines that are not of this
    format are passed over. Raises OSError when there is no such file."""
    return [line for line in map(_parse_line, Path(path).read_bytes().splitlines()) if line is not None]


def find_top_mount(mountpoint: Path | str, path: Path | str = MOUNTINFO) -> MountInfoLine | None:
    """The mount on top at a real path; None where nothing is mounted. Raises OSError as read_mountinfo does."""
    wanted = Path(mountpoint)
    return next((line for line in reversed(read_mountinfo(path)) if line.mountpoint == wanted), None)


def find_file_system(path: Path, mountinfo: Path | str = MOUNTINFO) -> tuple[Path, str]:
    """(mountpoint, type) of the file system, of any type, that holds `path`, which has to be a real path."""
    best, fstype = Path("/"), "unknown"
    for line in read_mountinfo(mountinfo):
        if path.is_relative_to(line.mountpoint) and len(line.mountpoint.parts) >= len(best.parts):
            best, fstype = line.mountpoint, line.fstype
    return best, fstype


def _parse_line(line: bytes) -> MountInfoLine | None:
    before, separator, after = line.partition(b" - ")
    fields, file_system = before.split(b" "), after.split(b" ")
    if not separator or len(fields) < 6 or len(file_system) < 3:
        return None
    options = frozenset(b",".join((fields[5], *file_system[2:])).decode("utf-8", "replace").split(","))
    user_ids = [option.removeprefix("user_id=") for option in options if option.startswith("user_id=")]
    return MountInfoLine(
        mountpoint=Path(os.fsdecode(_unescape(fields[4]))),
        device_number=fields[2].decode(),
        fstype=file_system[0].decode(),
        source=_unescape(file_system[1]).decode("utf-8", "replace"),
        options=options,
        user_id=int(user_ids[0]) if user_ids and user_ids[0].isdecimal() else 0,
    )


def _unescape(text: bytes) -> bytes:
    """The kernel writes space, tab, newline and backslash as three octal digits."""
    return _OCTAL_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), text)
