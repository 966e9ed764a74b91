"""A directory in memory (on a tmpfs) that one mount has for itself, for a store that is gone when the mount is.

Theory of operation. The directory is `fusecache-<16 hex digits>` of mode 0700, named after the mount, so that the
daemon that follows a killed one finds it again. The daemon that has the flock of the directory owns it; the kernel
drops the flock as the daemon dies. A directory without an owner is left over, and the next mount that makes one in the
same place removes it. That may hit a daemon that is just being restarted and was about to take it up: it makes a new
directory then, and handles that are open in the kernel keep their files.

| State of a directory | Event | Next |
|---|---|---|
| absent | a daemon makes and locks it | owned |
| owned | the mount ends: `remove_directory` | absent |
| owned | the daemon dies | left over |
| left over | the next daemon of the same mount locks it | owned; emptied unless the objects are kept and usable |
| left over | another mount makes its directory | absent |
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import stat
import time
from pathlib import Path

import xxhash

from fusecache.errors import StoreError
from fusecache.store.disk import format, locks

_log = logging.getLogger(__name__)

_NAME = re.compile(r"fusecache-[0-9a-f]{16}")
_LOCK_TIMEOUT = 10.0
"""Seconds to wait for an earlier daemon of the same mount, which is ending."""


class MemoryDirectory:
    """The directory of the mount at `mountpoint`, below `base`. With `keep_objects`, what an earlier daemon of this
    mount stored in it stays, if it can be used; otherwise the directory is emptied. Making one waits some seconds for
    an earlier daemon of the mount to end. Raises StoreError, in one line that names the way out."""

    def __init__(
        self, base: Path, *, runtime_dir: Path, mountpoint: Path, block_size: int, keep_objects: bool
    ) -> None:
        # the namespace: containers may share the tmpfs, and have mounts of the same path
        namespace = os.stat("/proc/self/ns/mnt").st_ino
        mount = os.fsencode(f"{namespace}\0{runtime_dir}\0{mountpoint}")
        self.path = base / f"fusecache-{xxhash.xxh3_64_hexdigest(mount)}"
        try:
            _remove_leftovers(base, self.path.name)
            self._fd = self._create_and_lock_directory()
            try:
                if not (keep_objects and _read_block_size(self.path) == block_size):
                    _clear_directory(self.path)
            except BaseException:
                os.close(self._fd)
                raise
        except OSError as error:
            raise StoreError(
                f"memory_dir {base} can't be used: {error.strerror}: set it to a tmpfs that may be written to"
            ) from error

    def _create_and_lock_directory(self) -> int:
        """Make the directory if need be, and lock it; returns the descriptor that holds the lock."""
        until = time.monotonic() + _LOCK_TIMEOUT
        while True:
            with contextlib.suppress(FileExistsError):
                self.path.mkdir(mode=0o700)
            try:
                fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            taken = False
            try:
                found = os.fstat(fd)
                if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
                    raise StoreError(f"{self.path} is not this user's alone: remove it, or set memory_dir")
                if not locks.wait_flock(fd, max(0.0, until - time.monotonic())):
                    raise StoreError(f"{self.path} is in use by another daemon: end it, or set memory_dir")
                # a mount that removes leftovers may have had the lock before, and unlinked it
                with contextlib.suppress(FileNotFoundError):
                    taken = os.path.samestat(found, os.stat(self.path))
                if taken:
                    return fd
            finally:
                if not taken:
                    os.close(fd)

    def remove_directory(self) -> None:
        """Remove the directory with all that is in it, and release the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release_ownership()

    def release_ownership(self) -> None:
        """Release the lock, as when the daemon is killed."""
        os.close(self._fd)


def _remove_leftovers(base: Path, own_name: str) -> None:
    """Remove the directories of mounts that are gone."""
    with os.scandir(base) as entries:
        found = [entry.name for entry in entries if _NAME.fullmatch(entry.name) and entry.name != own_name]
    for name in found:
        path = base / name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # another user's, or gone already
        try:
            if os.fstat(fd).st_uid == os.geteuid() and locks.try_flock(fd, exclusive=True):
                _log.info("removing %s: its mount is gone", path)
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(fd)


def _read_block_size(directory: Path) -> int | None:
    """The block size of the store in there; None: there is none, or this version of the program can't use it."""
    try:
        return format.parse_format((directory / "format").read_bytes())
    except FileNotFoundError:
        return None


def _clear_directory(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
