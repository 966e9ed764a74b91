"""The sizes of this machine's disks and memory, of which a setting may ask for a share."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fusecache.errors import ConfigError

_CGROUPS = Path("/sys/fs/cgroup")


def file_system_bytes(directory: Path) -> int:
    """Size of the file system of a directory that exists. Raises OSError."""
    found = os.statvfs(directory)
    return found.f_blocks * found.f_frsize


def cache_disk_size(directory: Path) -> int:
    """Bytes of the file system that holds the cache directory, or will when the directory is made. Raises
    ConfigError."""
    for candidate in (directory, *directory.parents):
        try:
            return file_system_bytes(candidate)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(f"cache directory {directory}: {candidate}: {error.strerror}") from error
    raise ConfigError(f"cache directory {directory}: not found")


def usable_memory(
    meminfo: Path = Path("/proc/meminfo"),
    own_cgroup: Path = Path("/proc/self/cgroup"),
    cgroups: Path = _CGROUPS,
) -> int:
    """Bytes of memory that this process may use: the least of the machine's memory and the limits of the cgroups
    (version 2) that the process is in, to which the pages of a tmpfs count, too. Raises ConfigError."""
    try:
        found = re.search(r"^MemTotal:\s*(\d+) kB$", meminfo.read_text("ascii"), re.MULTILINE)
        group = re.search(r"^0::/(.*)$", own_cgroup.read_text(), re.MULTILINE)
    except OSError as error:
        raise ConfigError(
            f"the size of the memory is unknown ({error}): set memory_size to a size like 64GiB"
        ) from error
    sizes = [int(found[1]) << 10] if found else []
    path = Path(group[1]) if group else Path()
    for level in (path, *path.parents):
        try:
            text = (cgroups / level / "memory.max").read_text("ascii").strip()
        except OSError:
            continue
        if text.isdecimal():
            sizes.append(int(text))
    if not sizes:
        raise ConfigError("the size of the memory is unknown: set memory_size to a size like 64GiB")
    return min(sizes)
