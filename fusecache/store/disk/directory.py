"""A cache directory: its paths, its lock, and what is checked and made before a store may use it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from fusecache.errors import ConfigError, StoreError
from fusecache.files import replace_file
from fusecache.locking import OwnedLock
from fusecache.store.disk import format, locks
from fusecache.store.disk.ledger import Ledger

LOCK_TIMEOUT = 2.0
"""Seconds to wait for the directory's lock, which is held for microseconds unless its holder was stopped."""


class CacheDirectory:
    """Paths below a cache directory, and its lock, which keeps threads and processes apart: it is held while files of
    objects are made, replaced or unlinked, and around the tallies of a recount. Functions that need it held assert
    that. Raises OSError if the lock file can't be made."""

    def __init__(self, directory: Path) -> None:
        self.path = directory
        self.format_path = directory / "format"
        self.ledger_path = directory / "ledger"
        self.index_path = directory / "index"
        self.data_root = directory / "data"
        self._mutex = OwnedLock()
        """Among the threads of this process, for which one flock is one owner."""
        self._lock_fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def data_path(self, object_id: str) -> Path:
        """The sparse file with the object's bytes."""
        return self.data_root / object_id[:2] / f"{object_id}.data"

    def blocks_path(self, object_id: str) -> Path:
        """The file with the checksums of the object's blocks."""
        return self.data_root / object_id[:2] / f"{object_id}.blocks"

    @contextlib.contextmanager
    def exclusive_lock(self) -> Iterator[bool]:
        """Hold the directory's lock; yields False when another thread or process kept it for LOCK_TIMEOUT, or the
        directory was closed."""
        if not self._mutex.acquire(timeout=LOCK_TIMEOUT):
            yield False
            return
        try:
            if self._lock_fd < 0:
                yield False
                return
            is_locked = locks.wait_flock(self._lock_fd, LOCK_TIMEOUT)
            try:
                yield is_locked
            finally:
                if is_locked:
                    locks.unlock_flock(self._lock_fd)
        finally:
            self._mutex.release()

    def assert_lock_held(self) -> None:
        """With checks (FUSECACHE_DEBUG_LOCKS): AssertionError unless this thread is inside `exclusive_lock`."""
        self._mutex.assert_held()

    def close(self) -> None:
        """Close the lock file: the lock can't be had any more."""
        with self._mutex:
            if self._lock_fd >= 0:
                os.close(self._lock_fd)
                self._lock_fd = -1


def prepare_directory(directory: Path, block_size: int) -> CacheDirectory:
    """Make the directory if its parent exists, with what belongs into it, or check what is there. Raises StoreError, or
    ConfigError for another block size, in one line that names the directory and the way out."""
    if sys.byteorder != "little":
        raise StoreError(f"cache directory {directory}: the store needs a little-endian machine")
    try:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        cache_directory = CacheDirectory(directory)
    except FileNotFoundError:
        raise StoreError(
            f"cache directory {directory}: its parent {directory.parent} does not exist: "
            f"mount the disk or run mkdir -p {directory}"
        ) from None
    except NotADirectoryError:
        raise StoreError(
            f"cache directory {directory} is not a directory: choose another cache_dir"
        ) from None
    except OSError as error:
        raise _unusable_error(directory, error) from error
    try:
        with cache_directory.exclusive_lock() as is_locked:
            if not is_locked:
                raise _stuck_lock_error(directory)
            _check_format(cache_directory, block_size)
            cache_directory.data_root.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        cache_directory.close()
        raise _unusable_error(directory, error) from error
    except BaseException:
        cache_directory.close()
        raise
    return cache_directory


def _check_format(cache_directory: CacheDirectory, block_size: int) -> None:
    cache_directory.assert_lock_held()
    directory = cache_directory.path
    try:
        found = format.parse_format(cache_directory.format_path.read_bytes())
    except FileNotFoundError:
        with replace_file(cache_directory.format_path) as temporary:
            temporary.write_bytes(format.pack_format(block_size))
        return
    if found is None:
        raise StoreError(
            f"cache directory {directory} was made by another version of fusecache: "
            f"delete it or choose another cache_dir"
        )
    if found != block_size:
        raise ConfigError(
            f"cache directory {directory} holds blocks of {found} bytes: "
            f"set block_size={found} or choose another cache_dir"
        )


def open_ledger(cache_directory: CacheDirectory) -> Ledger:
    """Open the directory's ledger, or make one, which can be relied on at once if the directory holds no objects.
    Raises StoreError in one line that names the directory and the way out."""
    try:
        with cache_directory.exclusive_lock() as is_locked:
            if not is_locked:
                raise _stuck_lock_error(cache_directory.path)
            return Ledger(cache_directory.ledger_path, is_empty=not os.listdir(cache_directory.data_root))
    except OSError as error:
        raise _unusable_error(cache_directory.path, error) from error


def read_boot_id() -> bytes:
    """16 bytes that are others after each start of the machine."""
    text = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
    return bytes.fromhex(text.strip().replace("-", ""))


def _unusable_error(directory: Path, error: OSError) -> StoreError:
    return StoreError(
        f"cache directory {directory} can't be used: {error.strerror}: "
        f"free or permit it, or choose another cache_dir"
    )


def _stuck_lock_error(directory: Path) -> StoreError:
    return StoreError(
        f"cache directory {directory} is locked by a process that does not go on: "
        f"end it (fuser {directory / 'lock'} names it)"
    )
