"""The checks of `fusecache doctor` that concern this machine."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fusecache.config.model import MountConfig, default_cache_dir
from fusecache.config.units import format_size
from fusecache.control.mountinfo import find_file_system
from fusecache.errors import ConfigError

MIN_PASSTHROUGH_KERNEL = (6, 9)
_CAP_SYS_ADMIN = 21
_LOW_FREE_SPACE = 10 << 30
_REMOTE_FILE_SYSTEMS = re.compile(r"nfs|cifs|smb|9p|ceph|lustre|fuse|afs|gpfs|glusterfs|virtiofs")
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Check:
    """One line of the doctor. `mend` says how to mend a check that is not ok."""

    name: str
    state: Literal["ok", "warn", "fail"]
    detail: str
    mend: str = ""


def run_local_checks(cache_dir: Path, settings: MountConfig | None) -> list[Check]:
    """Check the kernel, the privileges, the tools and the cache directory. Quick; raises nothing."""
    privileged = has_sys_admin()
    checks = [
        check_kernel(os.uname().release),
        check_privilege(privileged),
        check_device(Path("/dev/fuse")),
        check_fusermount(shutil.which("fusermount3"), privileged),
    ]
    if settings is not None and settings.allow_other and not privileged:
        checks.append(check_allow_other(Path("/etc/fuse.conf")))
    checks += [check_file_system(cache_dir), check_writable(cache_dir)]
    return [*checks, check_space(cache_dir, settings)]


def check_kernel(release: str) -> Check:
    """Whether this kernel has FUSE passthrough, which came with Linux 6.9."""
    match = re.match(r"(\d+)\.(\d+)", release)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version >= MIN_PASSTHROUGH_KERNEL:
        return Check("kernel", "ok", f"{release} can do FUSE passthrough")
    return Check(
        "kernel",
        "warn",
        f"{release} can't do FUSE passthrough: warm reads go through the daemon",
        "run Linux 6.9 or newer",
    )


def has_sys_admin(status: Path = Path("/proc/self/status")) -> bool:
    """Whether this process has CAP_SYS_ADMIN."""
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", status.read_text(), re.MULTILINE)
    return match is not None and bool(int(match[1], 16) >> _CAP_SYS_ADMIN & 1)


def check_privilege(privileged: bool) -> Check:
    """Whether this user may use passthrough, which needs CAP_SYS_ADMIN."""
    if privileged:
        return Check("privileges", "ok", "CAP_SYS_ADMIN: mount(2) and FUSE passthrough are allowed")
    return Check(
        "privileges",
        "warn",
        "no CAP_SYS_ADMIN: no FUSE passthrough, warm reads go through the daemon",
        "mount as root, or give the container CAP_SYS_ADMIN",
    )


def check_device(device: Path) -> Check:
    """Whether /dev/fuse is there and can be opened."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        mend = "modprobe fuse on the host, or start the container with --device /dev/fuse"
        return Check("device", "fail", f"{device} is missing", mend)
    except OSError as error:
        mend = f"chmod 666 {device}, or allow the device in the container's cgroup"
        return Check("device", "fail", f"{device}: {error.strerror}", mend)
    return Check("device", "ok", f"{device} can be opened")


def check_fusermount(program: str | None, privileged: bool) -> Check:
    """Whether fusermount3 is there, which makes the mount of a user without privileges."""
    if program:
        return Check("fusermount3", "ok", program)
    if privileged:
        return Check("fusermount3", "ok", "not installed, and not needed with CAP_SYS_ADMIN")
    return Check("fusermount3", "fail", "not installed, and needed without root", "apt-get install fuse3")


def check_allow_other(conf: Path) -> Check:
    """Whether root permits users to mount with allow_other; fusermount3 refuses it otherwise."""
    try:
        allowed = re.search(r"^\s*user_allow_other\s*$", conf.read_text(), re.MULTILINE)
    except OSError:
        allowed = None
    if allowed:
        return Check("allow_other", "ok", f"permitted by {conf}")
    return Check(
        "allow_other",
        "fail",
        f"{conf} does not permit it to users",
        f"as root: echo user_allow_other >>{conf}",
    )


def nearest_existing(directory: Path) -> Path:
    """`directory`, or the nearest parent that exists."""
    return next((path for path in (directory, *directory.parents) if path.exists()), Path("/"))


def check_file_system(cache_dir: Path) -> Check:
    """Whether the kernel can pass reads through to files of this file system; it can't where that is a stacked one."""
    directory = Path(os.path.realpath(nearest_existing(cache_dir.absolute())))
    mountpoint, kind = find_file_system(directory)
    where = f"{cache_dir} is on {kind} ({mountpoint})"
    if kind == "overlay":
        return Check(
            "cache disk",
            "fail",
            f"{where}: the kernel refuses passthrough to files on overlayfs, warm reads go through the daemon",
            "set cache_dir to a directory on a local disk; in a container, mount a volume there",
        )
    if _REMOTE_FILE_SYSTEMS.search(kind):
        return Check("cache disk", "warn", f"{where}, not a local disk", "set cache_dir to a local disk")
    if kind in _MEMORY_FILE_SYSTEMS:
        return Check(
            "cache disk", "warn", f"{where}: the cache takes memory", "set cache_dir to a local disk"
        )
    return Check("cache disk", "ok", where)


def check_writable(cache_dir: Path) -> Check:
    """Whether the daemon can write to the directory, or make it; it does not make its parents."""
    if cache_dir.exists() and not cache_dir.is_dir():
        return Check("cache dir", "fail", f"{cache_dir} is not a directory", "choose another cache_dir")
    directory = cache_dir if cache_dir.exists() else cache_dir.parent
    while cache_dir == default_cache_dir() and not directory.exists():
        directory = directory.parent
    if not directory.exists():
        return Check("cache dir", "fail", f"{directory} does not exist", f"mkdir -p {cache_dir}")
    if not os.access(directory, os.W_OK | os.X_OK):
        return Check(
            "cache dir",
            "fail",
            f"{directory} is not writable",
            f"chown it to user {os.geteuid()}, or set cache_dir",
        )
    return Check(
        "cache dir", "ok", f"{cache_dir} " + ("is writable" if cache_dir.exists() else "can be made")
    )


def check_space(cache_dir: Path, settings: MountConfig | None) -> Check:
    """How much the cache can grow: the free space above the floor."""
    try:
        found = os.statvfs(nearest_existing(cache_dir.absolute()))
        floor = settings.min_free_bytes() if settings else found.f_blocks * found.f_frsize // 20
    except (OSError, ConfigError) as error:
        return Check("free space", "fail", str(error), "mend the disk, or set cache_dir")
    free = found.f_bavail * found.f_frsize
    detail = f"{format_size(free)} free, of which {format_size(floor)} are kept free"
    if free <= floor:
        return Check(
            "free space", "fail", f"{detail}: nothing can be cached", "free some, or lower free_space"
        )
    if free - floor < _LOW_FREE_SPACE:
        return Check("free space", "warn", f"{detail}: little for models", "free some, or set cache_dir")
    return Check("free space", "ok", detail)
