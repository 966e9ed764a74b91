"""The two files of one object version: find, create, check, mark and discard them.

Invariants, also across a kill -9 anywhere:
- A .blocks file is only ever beside the .data file whose checksums it holds: creation makes .data first and moves a
  finished .blocks in last, discarding unlinks .blocks first; both under the directory's lock.
- A checksum is set after its bytes were written.
- Files disappear by unlink only: after LOCK_EX on the .data file was had (so that no process has it open), or, where
  the files are broken, under the directory's lock. A process that has them open keeps what it has.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from fusecache.blocks import block_count, block_length, contiguous_ranges
from fusecache.store.disk import format, locks
from fusecache.store.disk.directory import CacheDirectory
from fusecache.store.disk.ledger import Ledger
from fusecache.types import ObjectId, ObjectVersion

_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


@dataclass(frozen=True)
class BlocksFileSummary:
    """The summary of a .blocks file, without opening the .data file. `present_bytes` are the object's own bytes,
    `stored_bytes` what the ledger counts for them, file overhead included."""

    version: ObjectVersion
    block_size: int
    present_bytes: int
    stored_bytes: int
    state: format.BlocksFileState

    @property
    def is_complete(self) -> bool:
        """Whether all bytes are here."""
        return self.present_bytes == self.version.size

    @property
    def block_count(self) -> int:
        """Number of blocks, present or not."""
        return block_count(self.version.size, self.block_size)


class ObjectFiles:
    """The open files of one object version, with a shared lock on both. `open_object_files` and `create_object_files`
    make them. Every method may raise OSError. Thread-safe, as far as its calls go; one lock of its own guards the
    writable descriptor."""

    def __init__(self, header: format.BlocksFileHeader, read_fd: int, blocks_fd: int) -> None:
        self.header = header
        self.read_fd = read_fd
        self._blocks_fd = blocks_fd
        self._write_fd = -1
        self._lock = threading.Lock()
        self._mapping = mmap.mmap(blocks_fd, header.file_size, mmap.MAP_SHARED, mmap.PROT_READ)
        self._view = memoryview(self._mapping)
        end = format.HEADER_SIZE + format.CHECKSUM_SIZE * header.block_count
        self._checksum_bytes = self._view[format.HEADER_SIZE : end]
        self.checksums = self._checksum_bytes.cast("Q")
        """Checksum of each block, 0 where it is absent; live: other processes' blocks appear here."""
        locks.try_lock_bytes(blocks_fd, locks.IN_USE_BYTE, shared=True)

    @property
    def state(self) -> format.BlocksFileState:
        """The header's state now."""
        return format.parse_state(self._view)

    def set_clean(self, is_clean: bool, boot_id: bytes = b"") -> None:
        """Say in the header whether all blocks were verified, or written, during the boot `boot_id`."""
        if boot_id:
            os.pwrite(self._blocks_fd, boot_id, format.BOOT_ID_OFFSET)
        os.pwrite(self._blocks_fd, bytes((is_clean,)), format.CLEAN_OFFSET)

    def set_last_use(self, last_use_ns: int, accesses: int) -> None:
        """Record an access in the header."""
        os.pwrite(self._blocks_fd, last_use_ns.to_bytes(8, "little"), format.LAST_USE_OFFSET)
        os.pwrite(self._blocks_fd, bytes((accesses,)), format.ACCESSES_OFFSET)

    def count_repair(self) -> None:
        """Record in the header that a bad block was cleared, so that no process trusts what it remembers."""
        repairs = self.state.repairs + 1 & 0xFFFFFFFF
        os.pwrite(self._blocks_fd, repairs.to_bytes(4, "little"), format.REPAIRS_OFFSET)

    def set_attestation(self, record: format.AttestationRecord) -> None:
        """Record in the header what is known of the object as a whole."""
        os.pwrite(self._blocks_fd, record.pack(), format.ATTESTATION_OFFSET)

    def set_checksum(self, block: int, checksum: int) -> None:
        """Set the checksum of a block whose bytes were written: it is in the file from now on."""
        os.pwrite(self._blocks_fd, format.pack_checksum(checksum), format.checksum_offset(block))

    def clear_checksum(self, block: int) -> None:
        """Make a block absent; what the header says of the whole object is void."""
        if self.state.attestation.state is format.AttestationState.ATTESTED:
            self.set_attestation(format.AttestationRecord())
        os.pwrite(self._blocks_fd, bytes(format.CHECKSUM_SIZE), format.checksum_offset(block))

    def open_write_fd(self, path: Path) -> int:
        """A writable descriptor of the very file that `read_fd` reads; it is closed with the others. Raises
        FileNotFoundError if the file at `path` is another one."""
        with self._lock:
            if self._write_fd < 0:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                if not os.path.sameopenfile(fd, self.read_fd):
                    os.close(fd)
                    raise FileNotFoundError(path)
                self._write_fd = fd
            return self._write_fd

    def is_at(self, path: Path) -> bool:
        """Whether `path` still leads to this data file."""
        try:
            return os.path.samestat(os.fstat(self.read_fd), os.stat(path))
        except FileNotFoundError:
            return False

    def is_open_only_here(self) -> bool:
        """Whether no other process has the object open."""
        return locks.first_conflict(self._blocks_fd, locks.IN_USE_BYTE) is None

    def claim_blocks(self, blocks: range) -> range:
        """Claim the prefix of `blocks` that no other process fetches; returns it."""
        return locks.claim_prefix(self._blocks_fd, blocks)

    def unclaim_blocks(self, blocks: range) -> None:
        """Give claimed blocks back; does nothing after `close`."""
        if self._blocks_fd >= 0:
            locks.unlock_bytes(self._blocks_fd, blocks.start, len(blocks))

    def present_bytes(self) -> int:
        """Bytes of all blocks that have a checksum, verified or not."""
        return _sum_present_bytes(self.header, self.checksums)

    def close(self) -> None:
        """Close everything; the shared lock ends with the last copy of `read_fd`."""
        self.checksums.release()
        self._checksum_bytes.release()
        self._view.release()
        self._mapping.close()
        for fd in (self._blocks_fd, self._write_fd, self.read_fd):
            if fd >= 0:
                os.close(fd)
        self._blocks_fd = self._write_fd = self.read_fd = -1


def _sum_present_bytes(header: format.BlocksFileHeader, checksums: memoryview) -> int:
    marked = len(checksums) - checksums.tolist().count(0)
    total = marked * header.block_size
    if checksums and checksums[-1]:
        total -= header.block_size - block_length(
            header.block_count - 1, header.object_size, header.block_size
        )
    return total


def open_object_files(
    cache_directory: CacheDirectory, object_id: ObjectId, size: int, block_size: int
) -> ObjectFiles | None:
    """Open an object's files and share-lock them; None: there are none, they are broken, or just being evicted. Raises
    OSError.

    The caller need not hold a lock: open, lock, then see whether the path still leads to what was opened (eviction may
    have unlinked it in between, in which case there is nothing to open).
    """
    path = cache_directory.data_path(object_id)
    fds: list[int] = []
    try:
        try:
            fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOATIME))
        except PermissionError:
            fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        if not locks.try_flock(fds[0], exclusive=False):
            return None
        opened = os.fstat(fds[0])
        if not os.path.samestat(opened, os.stat(path)) or opened.st_size != size:
            return None
        fds.append(os.open(cache_directory.blocks_path(object_id), os.O_RDWR | os.O_CLOEXEC))
        header = format.parse_header(_read_all(fds[1]))
        if header is None or header.object_size != size or header.block_size != block_size:
            return None
        # .blocks is unlinked before .data and moved in after it: the same .data on both sides makes them a
        # pair
        if not os.path.samestat(opened, os.stat(path)):
            return None
        files = ObjectFiles(header, fds[0], fds[1])
        fds.clear()
        return files
    except FileNotFoundError:
        return None
    finally:
        for fd in fds:
            os.close(fd)


def create_object_files(
    cache_directory: CacheDirectory,
    version: ObjectVersion,
    header: format.BlocksFileHeader,
    boot_id: bytes,
    attestation: format.AttestationRecord = format.AttestationRecord(),  # noqa: B008  frozen
) -> ObjectFiles:
    """Make an object's files, replacing broken ones. The caller holds the directory's lock, and has found under it that
    there are none to open. Raises OSError, and leaves no file behind then."""
    cache_directory.assert_lock_held()
    path, blocks_path = cache_directory.data_path(version.id), cache_directory.blocks_path(version.id)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for leftover in (blocks_path, path):
        leftover.unlink(missing_ok=True)
    fds: list[int] = []
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, version.size)
        finally:
            os.close(fd)
        fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        locks.try_flock(fds[0], exclusive=False)
        temporary = blocks_path.with_suffix(".new")
        fds.append(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
        state = format.BlocksFileState(boot_id=boot_id, last_use_ns=time.time_ns(), attestation=attestation)
        _write_all(fds[1], format.pack_blocks_file(header, state))
        os.rename(temporary, blocks_path)
        files = ObjectFiles(header, fds[0], fds[1])
    except BaseException:
        for fd in fds:
            os.close(fd)
        with contextlib.suppress(OSError):
            blocks_path.with_suffix(".new").unlink(missing_ok=True)
            blocks_path.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        raise
    return files


def unlink_object_if_unused(cache_directory: CacheDirectory, object_id: str) -> bool:
    """Unlink an object's files if no process, and no passthrough backing, has them open.

    The caller holds the directory's lock. False: in use. Raises OSError.
    """
    cache_directory.assert_lock_held()
    try:
        fd = os.open(cache_directory.data_path(object_id), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        cache_directory.blocks_path(object_id).unlink(missing_ok=True)
        return True
    try:
        if not locks.try_flock(fd, exclusive=True):
            return False
        unlink_object(cache_directory, object_id)
        return True
    finally:
        os.close(fd)


def unlink_object(cache_directory: CacheDirectory, object_id: str) -> None:
    """Unlink an object's files, open or not. The caller holds the directory's lock. Raises OSError."""
    cache_directory.assert_lock_held()
    cache_directory.blocks_path(object_id).unlink(missing_ok=True)
    cache_directory.data_path(object_id).unlink(missing_ok=True)


def quarantine_files(
    cache_directory: CacheDirectory,
    ledger: Ledger,
    version: ObjectVersion,
    files: ObjectFiles,
    attestation: format.AttestationRecord,
) -> None:
    """Replace these files by some that hold nothing but the attestation, unless another process did, or made new ones.
    Processes that have the old files open keep them. Takes the directory's lock. Raises OSError."""
    with cache_directory.exclusive_lock() as is_locked:
        if not is_locked or not files.is_at(cache_directory.data_path(version.id)):
            return
        header, overhead = files.header, format.file_overhead(files.header)
        unlink_object(cache_directory, version.id)
        ledger.count_evicted(files.present_bytes() + overhead)
        ledger.count_committed(overhead, 0)
        try:
            create_object_files(cache_directory, version, header, bytes(16), attestation).close()
        except OSError:
            ledger.count_evicted(overhead)
            raise
        finally:
            ledger.clear_pending(overhead)


def free_uncommitted_space(cache_directory: CacheDirectory, object_id: str) -> None:
    """Give back the space of bytes that were written and have no checksum (their writer was killed, or its fetch
    failed): no ledger counts them. Does nothing for an object that a process has open, or that is complete, and where
    the file system has no holes. Takes the directory's lock. Raises OSError."""
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(cache_directory.exclusive_lock()):
            return
        try:
            fd = os.open(cache_directory.data_path(object_id), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        stack.callback(os.close, fd)
        summary = read_summary(cache_directory, object_id)
        before = os.fstat(fd)
        if (
            summary is None
            or not _has_uncommitted_space(summary, before)
            or not locks.try_flock(fd, exclusive=True)
        ):
            return
        data = memoryview(cache_directory.blocks_path(object_id).read_bytes())
        sums = data[format.HEADER_SIZE : format.checksum_offset(summary.block_count)].cast("Q")
        for run in contiguous_ranges((i for i, x in enumerate(sums) if not x), summary.block_count):
            start, stop = run.start * summary.block_size, run.stop * summary.block_size
            _libc.fallocate(fd, _FALLOC_KEEP_SIZE | _FALLOC_PUNCH_HOLE, start, stop - start)
        # no block with a checksum was touched: what was verified stays so, and mtime tells VerifiedBlocks that
        os.utime(fd, ns=(before.st_atime_ns, before.st_mtime_ns))


def _has_uncommitted_space(summary: BlocksFileSummary, stat: os.stat_result) -> bool:
    return (
        not summary.is_complete
        and stat.st_blocks * 512 > -(-summary.present_bytes // format.PAGE_SIZE) * format.PAGE_SIZE
    )


def may_have_uncommitted_space(cache_directory: CacheDirectory, summary: BlocksFileSummary) -> bool:
    """Whether `free_uncommitted_space` may find anything; opens nothing. Raises OSError."""
    return _has_uncommitted_space(summary, os.stat(cache_directory.data_path(summary.version.id)))


def read_summary(cache_directory: CacheDirectory, object_id: str) -> BlocksFileSummary | None:
    """The contents of an object's .blocks file; None: it is absent or broken. Raises OSError."""
    try:
        fd = os.open(cache_directory.blocks_path(object_id), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        data = _read_all(fd)
    finally:
        os.close(fd)
    header = format.parse_header(data)
    version = format.parse_identity(header.identity) if header else None
    if header is None or version is None or version.id != object_id or version.size != header.object_size:
        return None
    end = format.HEADER_SIZE + format.CHECKSUM_SIZE * header.block_count
    present = _sum_present_bytes(header, memoryview(data)[format.HEADER_SIZE : end].cast("Q"))
    return BlocksFileSummary(
        version,
        header.block_size,
        present,
        present + format.file_overhead(header),
        format.parse_state(data),
    )


def write_pinned(cache_directory: CacheDirectory, object_id: str, is_pinned: bool) -> bool:
    """Pin or unpin the object in its header, where every process's eviction sees it; False: there is no such object.
    Raises OSError."""
    try:
        fd = os.open(cache_directory.blocks_path(object_id), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        os.pwrite(fd, bytes((is_pinned,)), format.PINNED_OFFSET)
        return True
    finally:
        os.close(fd)


def _read_all(fd: int) -> bytes:
    size = os.fstat(fd).st_size
    parts = []
    offset = 0
    while offset < size:
        part = os.pread(fd, size - offset, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    offset = 0
    while offset < len(view):
        offset += os.pwrite(fd, view[offset:], offset)
