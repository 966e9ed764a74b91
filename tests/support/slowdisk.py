"""A disk that is slow: a loop device whose reads and writes a control group holds back."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

_BLKIO = Path("/sys/fs/cgroup/blkio")
_UNIFIED = Path("/sys/fs/cgroup")
_TIMEOUT = 30


@dataclass(frozen=True)
class SlowDisk:
    """A file system at `path`, slow for what runs behind `prefix`."""

    path: Path
    prefix: list[str]


@contextlib.contextmanager
def slow_disk(work: Path, *, size: int, per_second: int) -> Iterator[SlowDisk]:
    """A disk of `size` bytes that takes and gives so many bytes per second; unmounted and removed in the end. Where
    there can be none, the test is skipped."""
    if os.geteuid() != 0:
        pytest.skip("a slow disk needs root")
    image, path = work / "slow.img", work / "slow"
    image.touch()
    os.truncate(image, size)
    path.mkdir()
    _run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", str(image))
    with contextlib.ExitStack() as stack:
        device = _run("losetup", "--find", "--show", "--direct-io=on", str(image))
        stack.callback(_run, "losetup", "--detach", device)
        _run("mount", device, str(path))
        stack.callback(_run, "umount", "-l", str(path))
        group = stack.enter_context(_group(f"fusecache-{os.getpid()}-{Path(device).name}"))
        _limit(group, device, per_second)
        procs = group / "cgroup.procs"
        yield SlowDisk(path, ["sh", "-c", f'echo $$ > {procs} && exec "$@"', "sh"])


def _run(*words: str) -> str:
    try:
        found = subprocess.run(words, check=True, capture_output=True, text=True, timeout=_TIMEOUT)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no slow disk here: {words[0]}: {getattr(error, 'stderr', '') or error}")
    return found.stdout.strip()


@contextlib.contextmanager
def _group(name: str) -> Iterator[Path]:
    parent = _BLKIO if _BLKIO.is_dir() else _UNIFIED
    group = parent / name
    try:
        if parent is _UNIFIED:
            (parent / "cgroup.subtree_control").write_text("+io")
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group for a slow disk here: {error}")
    try:
        yield group
    finally:
        with contextlib.suppress(OSError):
            for pid in (group / "cgroup.procs").read_text().split():
                (parent / "cgroup.procs").write_text(pid)
        with contextlib.suppress(OSError):
            group.rmdir()


def _limit(group: Path, device: str, per_second: int) -> None:
    number = os.stat(device).st_rdev
    which = f"{os.major(number)}:{os.minor(number)}"
    try:
        if group.parent == _BLKIO:
            for what in ("read", "write"):
                (group / f"blkio.throttle.{what}_bps_device").write_text(f"{which} {per_second}")
        else:
            (group / "io.max").write_text(f"{which} rbps={per_second} wbps={per_second}")
    except OSError as error:
        pytest.skip(f"the control group does not hold a disk back here: {error}")
