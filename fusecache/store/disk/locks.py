"""File locks between processes, all of which the kernel drops when their process dies, however it dies.

Two families that do not see each other:
- flock on a .data file's read descriptor: LOCK_SH while an object is open. It belongs to the open file
  description, so it travels with the descriptor that a FUSE passthrough backing holds, past the end of this
  process. Eviction takes LOCK_EX. On the `lock` file: LOCK_EX around changes to which files exist.
- OFD byte locks (fcntl): claims of single blocks on the .blocks file, slots of the ledger, and a read lock
  on byte IN_USE of the .blocks file, which can be asked about without being taken (flock can't).

No function here waits in the kernel, since a stopped process may hold a lock for ever.
"""

from __future__ import annotations

import fcntl
import struct
import time
from collections.abc import Callable
from types import TracebackType

IN_USE_BYTE = 1 << 40
"""Byte of a .blocks file that is read-locked by every process that has the object open; beyond any block."""

_FLOCK = struct.Struct("hhqqi4x")


def try_flock(fd: int, *, exclusive: bool) -> bool:
    """Take or convert the flock of this descriptor without waiting; False: it is taken. A failed conversion loses the
    old lock."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock_flock(fd: int) -> None:
    """Drop the flock of this descriptor."""
    fcntl.flock(fd, fcntl.LOCK_UN)


def wait_flock(fd: int, timeout: float) -> bool:
    """Take LOCK_EX, asking for it every few milliseconds for `timeout` seconds; False: its holder kept it."""
    deadline = time.monotonic() + timeout
    pause = 0.001
    while not try_flock(fd, exclusive=True):
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 2, 0.02)
    return True


def try_lock_bytes(fd: int, start: int, length: int = 1, *, shared: bool = False) -> bool:
    """Take the OFD lock of the bytes [start, start + length) without waiting; False: some of them are taken."""
    kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, 0, start, length, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True


def unlock_bytes(fd: int, start: int, length: int = 1) -> None:
    """Drop the OFD lock of these bytes."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, 0, start, length, 0))


def first_conflict(fd: int, start: int, length: int = 1) -> int | None:
    """First of these bytes that another open file description has locked in any way, as far as one query tells; None:
    none of them."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, 0, start, length, 0)
    kind, _, found, _, _ = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else max(found, start)


class BlockClaim:
    """The right to fetch the blocks of `blocks`, against all other processes, until `release`.

    `blocks` is the longest prefix of the blocks asked for that no other process had claimed, maybe empty. Threads of
    one process are not kept apart: the scheduler gives each block to one flight. A context manager, which enters with
    the blocks.
    """

    def __init__(self, blocks: range, release_blocks: Callable[[range], None] | None) -> None:
        self.blocks = blocks
        self._release_blocks = release_blocks

    def release(self) -> None:
        """Give the blocks back; does nothing the second time. Does not raise."""
        release, self._release_blocks = self._release_blocks, None
        if release is not None and self.blocks:
            release(self.blocks)

    def __enter__(self) -> range:
        return self.blocks

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.release()


def claim_prefix(fd: int, blocks: range) -> range:
    """Lock as many of `blocks`, from the first one on, as no other process has locked; returns those."""
    stop = blocks.stop
    while stop > blocks.start:
        length = stop - blocks.start
        if try_lock_bytes(fd, blocks.start, length):
            return range(blocks.start, stop)
        found = first_conflict(fd, blocks.start, length)
        # None: the other process let go between the two calls, ask again
        stop = stop if found is None else min(found, stop - 1)
    return range(blocks.start, blocks.start)
