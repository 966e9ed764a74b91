"""Space accounting that all processes on a cache directory share, and that a kill -9 at any instant leaves valid.

Theory of operation: one small file with a slot per process. A process writes only its own slot (bytes committed,
evicted, reserved) and reads all of them, so no process waits for another one:

    used = correction + sum(committed - evicted) over all slots + sum(reserved) over the slots of living
    processes

- The process that holds the OFD lock on a slot's byte owns the slot; the kernel drops the lock with the process (a
  pid would mean nothing between the containers that share a directory). The next owner goes on with the counters and
  voids `reserved`.
- `reserve_bytes` publishes first and checks then: two processes may both find the directory full and back off, but
  never both pass. (Check first: A reads used, B reads used, A adds, B adds, and the limit is exceeded.)
- A block is counted before its checksum is set, and an eviction after its unlink: a crash in between leaves the count
  too high, which costs an early eviction, never the limit. A recount (by the background scan) mends it.
- Bytes that are counted, and whose checksums may not be set yet, are `pending`: that is cleared with the next write of
  the slot, and only loosens a recount's bounds. Files are made and removed, and counted so, under the directory's
  lock, which a recount takes for its two tallies: no file is unlinked but not yet counted as evicted in them.
"""

from __future__ import annotations

import errno
import mmap
import os
from dataclasses import dataclass, replace
from pathlib import Path

from fusecache.errors import StoreError
from fusecache.files import replace_file
from fusecache.locking import OwnedLock
from fusecache.store.disk import format, locks

_RECOUNT_BYTE = format.LEDGER_SLOTS


@dataclass(frozen=True)
class Tally:
    """Sums over all slots at one moment, in bytes, and what the last recount found them to be off by."""

    committed: int
    evicted: int
    reserved: int
    pending: int
    correction: int

    @property
    def stored(self) -> int:
        """Bytes in the store, without what is only reserved."""
        return max(0, self.correction + self.committed - self.evicted)


class Ledger:
    """This process's slot in the ledger at `path`, and the sums over all of them. Thread-safe.

    The caller holds the directory's lock while it makes one. `is_empty` says that the directory holds no objects, so
    that a new ledger can be relied on. Raises StoreError when all slots are taken and OSError when the file can't be
    made. Methods that write raise OSError; each writes 32 bytes.

    `_lock` guards this process's slot: the counters and their bytes in the file.
    """

    def __init__(self, path: Path, *, is_empty: bool) -> None:
        self._lock = OwnedLock()
        self._fd = self._open_file(path, is_empty)
        try:
            self._map = mmap.mmap(self._fd, format.LEDGER_SIZE, mmap.MAP_SHARED, mmap.PROT_READ)
            self._view = memoryview(self._map)
            self._slot_index = self._lock_free_slot(path)
            old = format.parse_slot(self._view, self._slot_index)
            self._committed_bytes, self._evicted_bytes, self._reserved_bytes, self._pending_bytes = (
                old.committed,
                old.evicted,
                0,
                0,
            )
            self._pid = os.getpid()
            with self._lock:
                self._write_slot_locked()
        except BaseException:
            os.close(self._fd)
            raise

    def _open_file(self, path: Path, is_empty: bool) -> int:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            pass
        else:
            if format.is_valid_ledger(os.pread(fd, format.LEDGER_SIZE + 1, 0)):
                return fd
            os.close(fd)
        with replace_file(path) as temporary:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(fd, format.pack_ledger(is_counted=is_empty), 0)
                os.fsync(fd)
            finally:
                os.close(fd)
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def _lock_free_slot(self, path: Path) -> int:
        for index in range(format.LEDGER_SLOTS):
            if locks.try_lock_bytes(self._fd, index):
                return index
        raise StoreError(
            f"cache directory {path.parent} is in use by {format.LEDGER_SLOTS} processes: "
            "give some of them another cache_dir"
        )

    def _write_slot_locked(self) -> None:
        self._lock.assert_held()
        if self._fd >= 0:
            slot = format.LedgerSlot(
                self._committed_bytes,
                self._evicted_bytes,
                self._reserved_bytes,
                self._pending_bytes,
                self._pid,
            )
            os.pwrite(self._fd, slot.pack(), format.ledger_slot_offset(self._slot_index))

    @property
    def is_counted(self) -> bool:
        """Whether the sums mean anything: not after the ledger was lost, until a recount."""
        return self._fd < 0 or format.is_ledger_counted(self._view)

    def tally(self) -> Tally:
        """The sums now; zeros after `close`. Reservations of dead processes count until `void_dead_reservations`."""
        if self._fd < 0:
            return Tally(0, 0, 0, 0, 0)
        sums = format.sum_slots(self._view)
        correction = format.ledger_correction(self._view)
        return Tally(sums.committed, sums.evicted, sums.reserved, sums.pending, correction)

    def used_bytes(self) -> int:
        """Bytes stored and reserved."""
        tally = self.tally()
        return tally.stored + tally.reserved

    def void_dead_reservations(self) -> bool:
        """Void what dead processes had reserved; returns whether there was anything to void."""
        was_voided = False
        for index in range(format.LEDGER_SLOTS):
            slot = format.parse_slot(self._view, index)
            has_any = slot.reserved or slot.pending
            if index == self._slot_index or not has_any or not locks.try_lock_bytes(self._fd, index):
                continue
            slot = replace(format.parse_slot(self._view, index), reserved=0, pending=0)
            os.pwrite(self._fd, slot.pack(), format.ledger_slot_offset(index))
            locks.unlock_bytes(self._fd, index)
            was_voided = True
        return was_voided

    def reserve_bytes(self, nbytes: int, limit: int) -> int:
        """Reserve `nbytes` and return 0, or reserve nothing and return by how many bytes `limit` would be exceeded."""
        with self._lock:
            self._reserved_bytes += nbytes
            self._write_slot_locked()
        excess = self.used_bytes() - limit
        if excess <= 0:
            return 0
        self.unreserve_bytes(nbytes)
        return excess

    def unreserve_bytes(self, nbytes: int) -> None:
        """Give `nbytes` of this process's reservation back."""
        with self._lock:
            self._reserved_bytes = max(0, self._reserved_bytes - nbytes)
            self._write_slot_locked()

    def count_committed(self, nbytes: int, reserved: int) -> None:
        """Count `nbytes` as stored, of which `reserved` were reserved before. The caller sets their checksums next, and
        calls `clear_pending(nbytes)`, also when it could not set them."""
        with self._lock:
            self._committed_bytes += nbytes
            self._pending_bytes += nbytes
            self._reserved_bytes = max(0, self._reserved_bytes - reserved)
            self._write_slot_locked()

    def clear_pending(self, nbytes: int) -> None:
        """The checksums of these committed bytes are set now. Reaches the file with the next write of the slot."""
        with self._lock:
            self._pending_bytes -= nbytes

    def flush_slot(self) -> None:
        """Write the slot, and with it what `clear_pending` told."""
        with self._lock:
            self._write_slot_locked()

    def count_evicted(self, nbytes: int) -> None:
        """Count `nbytes` as gone."""
        with self._lock:
            self._evicted_bytes += nbytes
            self._write_slot_locked()

    def start_recount(self) -> Tally | None:
        """The sums before the files are counted, for `finish_recount`; None: another process is counting. The caller
        holds the directory's lock."""
        if not locks.try_lock_bytes(self._fd, _RECOUNT_BYTE):
            return None
        self.flush_slot()
        return self.tally()

    def finish_recount(self, before: Tally, counted: int | None) -> int:
        """Correct the sums by what a walk over all files has counted, in bytes; returns the change. None: the walk was
        given up, and corrects nothing. The caller holds the directory's lock, unless it was given up.

        Others commit and evict during the walk, and it may or may not have seen each of these. The bytes that was
        stored at the end is therefore at least `counted` - evicted since, and at most `counted` + committed
        since + what was pending at the start: the sums are moved into these bounds, which meet when the
        directory was quiet.
        """
        try:
            if counted is None:
                return 0
            now = self.tally()
            low = counted - (now.evicted - before.evicted)
            high = counted + (now.committed - before.committed) + before.pending
            raw = now.correction + now.committed - now.evicted
            change = min(max(raw, low), high) - raw
            if change:
                correction = format.pack_correction(now.correction + change)
                os.pwrite(self._fd, correction, format.LEDGER_CORRECTION_OFFSET)
            os.pwrite(self._fd, b"\1", format.LEDGER_COUNTED_OFFSET)
            return change
        finally:
            locks.unlock_bytes(self._fd, _RECOUNT_BYTE)

    def close(self) -> None:
        """Void this process's reservations and give the slot back."""
        with self._lock:
            if self._fd < 0:
                return
            self._reserved_bytes = self._pending_bytes = 0
            try:
                self._write_slot_locked()
            except OSError as error:
                if error.errno not in (errno.EIO, errno.EROFS, errno.ENOSPC):
                    raise
            self._view.release()
            self._map.close()
            os.close(self._fd)
            self._fd = -1
