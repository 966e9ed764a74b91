"""One object version in the store, open: which blocks are there, and the bytes of them.

Theory of operation. Two layers of knowledge: `sums` of the files, shared with all processes through the page
cache (a block with a checksum is in the data file), and `_verified`, private to this process (a block that
this process wrote, or hashed itself). Only the second is ever served, so the hot questions are answered from
a bytearray without a lock: a byte goes from 0 to 1 once, and back only when its block is found bad.

Lock order: `_lock` (this object) before the store's locks. `_lock` is never held across the I/O of blocks;
it is held across the 8-byte pwrite of a checksum, so that a block is counted once.

A bad block is cleared, and fetched again in place, if nobody else has the object open. Otherwise another
process may be serving it through passthrough, and a file that is being served is never rewritten: the files
are unlinked and this object is `retired`: what it verified goes on being served from the unlinked file, the
rest is streamed uncached, and the next open starts a new file.

A sealed object (seals.py) is filled and verified like any other, but covers nothing until it was attested.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import operator
import os
import random
import threading
import time
from typing import TYPE_CHECKING

import xxhash

from fusecache.blocks import block_count, block_length
from fusecache.checksum import block_checksum
from fusecache.errors import StoreError, StoreFullError
from fusecache.store.attestation import quarantine_files
from fusecache.store.context import StoreContext
from fusecache.store.disk import files as fs
from fusecache.store.disk import format
from fusecache.store.disk.files import ObjectFiles
from fusecache.store.disk.format import AttestationRecord, AttestationState
from fusecache.store.disk.locks import BlockClaim
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = logging.getLogger(__name__)
_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


class StoredObject:
    """An open object version of a Store; see there. Thread-safe; shared by all who open the version in this
    process."""

    def __init__(self, version: ObjectVersion, context: StoreContext) -> None:
        self.version = version
        self.block_size = context.block_size
        self.block_count = block_count(version.size, context.block_size)
        self.open_count = 0
        """Guarded by the store's lock."""
        self.is_retired = False
        """Its files were given up: nothing more is written."""
        self._context = context
        self._size = version.size
        self._lock = threading.RLock()
        self._files: ObjectFiles | None = None
        self._verified = bytearray(self.block_count)
        self._missing_block_count = self.block_count
        self.is_complete = self._missing_block_count == 0
        """Every block is present. A plain attribute: it is read for each READ."""
        self.is_unattested = (
            context.attestation_policy is not None and not context.attestation_policy.is_exempt(version)
        )
        """Nobody is to be given its bytes yet. A plain attribute, too."""
        self.quarantine_sha256: bytes | None = None
        """The sha256 that it was found to have, against its manifest."""
        self.bad_block_count = 0
        """Blocks that were found bad since it was opened."""
        self._bad_blocks: set[int] = set()
        """Blocks of a retired object that still have a checksum and must not be tried again."""
        self.has_written = False
        """Bytes were written, maybe more than were committed."""
        self._is_unclean = False
        self._reserved_bytes = 0
        self._mapping: mmap.mmap | None = None
        self._view: memoryview | None = None
        self._is_access_counted = False
        self._is_created_here = False
        with self._lock:
            self._open_files_locked()

    # -- questions, lock-free

    def is_present(self, block: int) -> bool:
        """Whether the block is in the data file and was verified, or written, by this process."""
        return self._verified[block] == 1

    def is_unverified(self, block: int) -> bool:
        """Whether the block is in the data file but was not verified by this process yet."""
        files = self._files
        if files is None or self._verified[block] or files.checksums[block] == 0:
            return False
        return block not in self._bad_blocks

    def checksum(self, block: int) -> int:
        """xxh3_64 of a block in the data file, 0 for none."""
        files = self._files
        return 0 if files is None else files.checksums[block]

    def is_range_servable(self, offset: int, length: int) -> bool:
        """Whether all blocks of the bytes [offset, offset + length), as far as the object has them, are
        present, and it is not sealed."""
        if self.is_unattested:
            return False
        if self.is_complete:
            return True
        end = min(offset + length, self._size)
        if offset >= end:
            return True
        size = self.block_size
        return self._verified.find(0, offset // size, (end - 1) // size + 1) < 0

    def cached_bytes(self) -> int:
        """Bytes of the blocks that are in the data file, verified or not."""
        if self.is_complete:
            return self._size
        files = self._files
        return 0 if files is None else files.present_bytes()

    @property
    def is_servable(self) -> bool:
        """Whether all of it may be given to anybody."""
        return self.is_complete and not self.is_unattested

    @property
    def missing_block_count(self) -> int:
        """How many blocks are not present."""
        return self._missing_block_count

    def room_without_eviction(self, kept_share: float) -> int:
        """See Space: where this object is."""
        return self._context.space.room_without_eviction(kept_share)

    # -- verification

    def verify_block(self, block: int) -> bool:
        """Read and hash a block: True makes it present; a bad or unreadable one is discarded and counted."""
        files = self._files
        if files is None:
            return False
        length = block_length(block, self._size, self.block_size)
        # a checksum that another process is just writing or clearing may be read torn: bad only if it stays
        for _ in range(3):
            expected = files.checksums[block]
            if expected == 0:
                # another process cleared it: what this one wrote or verified itself still holds
                return self.is_present(block)
            try:
                actual = self._hash_block(files, block, length)
            except OSError as error:
                self._context.health.report_failure(error)
                actual = None
            if actual == expected:
                self._mark_present(block)
                return True
            if files.checksums[block] == expected:
                break
        self._discard_bad_block(files, block, expected)
        return False

    def _hash_block(self, files: ObjectFiles, block: int, length: int) -> int | None:
        buffers = self._context.hash_buffers
        buffer: bytearray | None = getattr(buffers, "buffer", None)
        if buffer is None:
            buffer = buffers.buffer = bytearray(self.block_size)
        with memoryview(buffer)[:length] as view:
            done = 0
            while done < length:
                got = os.preadv(files.read_fd, [view[done:]], block * self.block_size + done)
                if got == 0:
                    return None
                done += got
            # update() lets the GIL go, the one-shot functions don't
            digest = xxhash.xxh3_64()
            digest.update(view)
            return block_checksum(digest)

    def _mark_present(self, block: int) -> None:
        with self._lock:
            if not self._verified[block]:
                self._verified[block] = 1
                self._missing_block_count -= 1
                if self._missing_block_count == 0:
                    self.is_complete = True

    def _discard_bad_block(self, files: ObjectFiles, block: int, expected: int) -> None:
        with self._lock:
            self.bad_block_count += 1
            if self._verified[block]:
                self._verified[block] = 0
                self._missing_block_count += 1
                self.is_complete = False
            self.is_unattested = self._read_attestation(None)[0]
            if self.is_retired or files.checksums[block] != expected:
                return
            try:
                alone = files.is_open_only_here()
                if alone:
                    with self._context.cache_directory.exclusive_lock():
                        files.count_repair()
                        files.clear_checksum(block)
                        self._context.ledger.count_evicted(block_length(block, self._size, self.block_size))
                else:
                    self._retire_files_locked(files)
            except OSError as error:
                self._context.health.report_failure(error)
                self.is_retired = True
                alone = False
            if self.is_retired:
                self._bad_blocks.add(block)
        self._context.count_corrupt_block(self, block, alone)

    def _retire_files_locked(self, files: ObjectFiles) -> None:
        """Unlink the files, unless another process did so already and maybe made new ones."""
        stored = files.present_bytes() + format.file_overhead(files.header)
        self.is_retired = True
        with self._context.cache_directory.exclusive_lock() as locked:
            if locked and files.is_at(self._context.cache_directory.data_path(self.version.id)):
                fs.unlink_object(self._context.cache_directory, self.version.id)
                self._context.ledger.count_evicted(stored)

    # -- the whole

    def mark_attested(self, sha256: bytes) -> None:
        """Somebody vouches for all of its bytes, which are here: break the seal."""
        seals = self._context.attestation_policy
        with self._lock:
            if seals is None or not self.is_complete or self.quarantine_sha256 is not None:
                return
            self.is_unattested = False
            if self._files is not None and not self.is_retired:
                try:
                    self._files.set_attestation(
                        AttestationRecord(AttestationState.ATTESTED, sha256, seals.anchor)
                    )
                except OSError as error:  # it is asked for again after the next start
                    self._context.health.report_failure(error)
        self._context.record_object(self)

    def enter_quarantine(self, sha256: bytes) -> None:
        """Its bytes are not what they have to be: give them up, and leave the mark in their place."""
        shared = self._context
        with self._lock:
            files = self._files
            self.quarantine_sha256 = sha256
            if files is None or shared.attestation_policy is None or self.is_retired:
                return
            seal = AttestationRecord(AttestationState.QUARANTINED, sha256, shared.attestation_policy.anchor)
            try:
                quarantine_files(shared.cache_directory, shared.ledger, self.version, files, seal)
            except OSError as error:
                shared.health.report_failure(error)
            # only now: from here on the version is opened anew, and the mark has to be there
            self.is_retired = True
        shared.record_quarantined(self)

    def lift_quarantine(self) -> None:
        """End a quarantine: the manifest says something else now."""
        with self._lock:
            self.quarantine_sha256 = None
            if self._files is not None:
                try:
                    self._files.set_attestation(AttestationRecord())
                except OSError as error:
                    self._context.health.report_failure(error)

    def _read_attestation(self, files: ObjectFiles | None) -> tuple[bool, bytes | None]:
        seals = self._context.attestation_policy
        return (False, None) if seals is None else seals.read_attestation(self.version, files)

    # -- filling

    def reserve_bytes(self, nbytes: int) -> bool:
        """Make sure that `nbytes` more can be written, evicting others; False: the caller streams
        uncached."""
        if self.is_retired:
            return False
        if not self._ensure_files() or not self._context.space.reserve_bytes(nbytes):
            return False
        with self._lock:
            self._reserved_bytes += nbytes
        return True

    def unreserve_bytes(self, nbytes: int) -> None:
        """Give reserved bytes back that will not be committed."""
        with self._lock:
            nbytes = min(nbytes, self._reserved_bytes)
            self._reserved_bytes -= nbytes
        self._context.space.unreserve_bytes(nbytes)

    def write(self, offset: int, data: Buffer) -> None:
        """Write bytes at `offset`; they count for nothing until their blocks are committed.

        Raises StoreFullError when the disk is full and eviction did not help, StoreError on any other
        failure; the disk is bypassed from then on until it works again.
        """
        if self.is_complete:
            return  # a complete file may be served by passthrough and is never rewritten
        files = self._files
        if files is None or self.is_retired:
            raise StoreError(f"{self.version.key}: no space was reserved in the cache")
        view = memoryview(data).cast("B")
        retried = False
        self.has_written = True
        try:
            fd = files.open_write_fd(self._context.cache_directory.data_path(self.version.id))
            done = 0
            while done < len(view):
                try:
                    done += os.pwrite(fd, view[done:], offset + done)
                except OSError as error:
                    if (
                        error.errno not in _FULL_ERRNOS
                        or retried
                        or not self._context.space.evict_on_enospc(len(view) - done)
                    ):
                        raise
                    retried = True
        except FileNotFoundError as error:
            self.is_retired = True
            raise StoreError(f"{self.version.key}: the cache file was removed") from error
        except OSError as error:
            self._context.health.report_failure(error)
            kind = StoreFullError if error.errno in _FULL_ERRNOS else StoreError
            raise kind(f"cache directory {self._context.cache_directory.path}: {error.strerror}") from error

    def commit_block(self, block: int, checksum: int) -> None:
        """Mark a block present whose bytes were all written; `checksum` is their xxh3_64_intdigest.

        Raises StoreError when that can't be recorded; the block is then absent.
        """
        files = self._files
        length = block_length(block, self._size, self.block_size)
        with self._lock:
            if files is None or self.is_retired:
                self.unreserve_bytes(length)
                return
            consumed = min(length, self._reserved_bytes)
            self._reserved_bytes -= consumed
            try:
                if not self._is_unclean:
                    files.set_clean(False)
                    self._is_unclean = True
                fresh = files.checksums[block] == 0
                counted = length if fresh else 0
                self._context.ledger.count_committed(counted, consumed)
                try:
                    files.set_checksum(block, checksum)
                finally:
                    self._context.ledger.clear_pending(counted)
            except OSError as error:
                self._context.health.report_failure(error)
                raise StoreError(
                    f"cache directory {self._context.cache_directory.path}: {error.strerror}"
                ) from error
            self._mark_present(block)

    def claim_blocks(self, blocks: range) -> BlockClaim:
        """Claim the fetch of the longest obtainable prefix of `blocks` (ascending) against other processes.

        When the object can't be stored there is nothing to share, and all of `blocks` is granted. Blocks
        that another process committed before the claim was had are `unverified` then: look again.
        """
        if self.is_retired or not self._ensure_files():
            return BlockClaim(blocks, None)
        files = self._files
        assert files is not None
        try:
            return BlockClaim(files.claim_blocks(blocks), self._unclaim_blocks)
        except OSError as error:
            self._context.health.report_failure(error)
            return BlockClaim(blocks, None)

    def _unclaim_blocks(self, blocks: range) -> None:
        files = self._files
        if files is not None:
            with contextlib.suppress(OSError):
                files.unclaim_blocks(blocks)

    # -- the data file

    def view(self) -> memoryview | None:
        """The object's bytes, read-only, of which only present blocks mean anything; None: empty, or no file
        yet.

        The same view until the last close; slices of it may outlive that.
        """
        if self._view is None:
            with self._lock:
                if self._view is None and self._files is not None and self._size:
                    try:
                        mapping = mmap.mmap(self._files.read_fd, self._size, mmap.MAP_SHARED, mmap.PROT_READ)
                    except OSError as error:
                        self._context.health.report_failure(error)
                        return None
                    self._mapping = mapping
                    self._view = memoryview(mapping)
        return self._view

    def fileno(self) -> int:
        """Read-only descriptor of the data file, whose shared lock keeps the file from eviction as long as
        any copy of the descriptor is open, a FUSE passthrough backing's included. Raises StoreError when
        there is no file."""
        files = self._files
        if files is None:
            raise StoreError(f"{self.version.key}: nothing of it is in the cache")
        return files.read_fd

    def count_access(self) -> None:
        """Count an access, once between first open and last close, and not the one that brings the object
        in."""
        if self._is_access_counted:
            return
        with self._lock:
            self._is_access_counted = True
            files = self._files
            if files is not None:
                with contextlib.suppress(OSError):
                    files.set_last_use(
                        time.time_ns(), min(3, files.state.accesses + (not self._is_created_here))
                    )

    def close(self) -> None:
        """Drop one open; the last one closes the files."""
        self._context.close_object(self)

    # -- called by the store

    def _open_files_locked(self) -> bool:
        """Open the files if there are any."""
        if self._files is None and self._size:
            try:
                files = fs.open_object_files(
                    self._context.cache_directory, self.version.id, self._size, self.block_size
                )
            except OSError as error:
                self._context.health.report_failure(error)
                return False
            if files is not None:
                self._adopt_files_locked(files)
        return self._files is not None

    def _adopt_files_locked(self, files: ObjectFiles) -> None:
        state = files.state
        known = self._context.verified_blocks.entries.pop(self.version.id, None)
        if self._context.trusts_boot and state.is_clean and state.boot_id == self._context.boot_id:
            self._verified[:] = bytes(map(bool, files.checksums))
        elif known is not None and known[0] == _fingerprint(files):
            self._verified[:] = bytes(map(operator.and_, known[1], map(bool, files.checksums)))
        self._missing_block_count = self._verified.count(0)
        self.is_unattested, self.quarantine_sha256 = self._read_attestation(files)
        self._files = files
        self.is_complete = self._missing_block_count == 0

    def _ensure_files(self) -> bool:
        if self._files is not None:
            return True
        shared = self._context
        if self._size == 0 or not shared.health.ensure_usable():
            return False
        with self._lock:
            if self._open_files_locked():
                return True
            header = format.BlocksFileHeader(
                self.block_size, self._size, random.getrandbits(64), format.pack_identity(self.version)
            )
            overhead = format.file_overhead(header)
            if not shared.space.reserve_bytes(overhead):
                return False
            try:
                with shared.cache_directory.exclusive_lock() as locked:
                    if not locked:
                        return False
                    if self._open_files_locked():
                        return True
                    if not fs.unlink_object_if_unused(shared.cache_directory, self.version.id):
                        return False
                    # counted before the files are there: a crash in between leaves the count too high
                    shared.ledger.count_committed(overhead, overhead)
                    overhead, counted = 0, overhead
                    try:
                        self._files = fs.create_object_files(
                            shared.cache_directory, self.version, header, shared.boot_id
                        )
                    except OSError:
                        shared.ledger.count_evicted(counted)
                        raise
                    finally:
                        shared.ledger.clear_pending(counted)
                    self._is_unclean = self._is_created_here = True
            except OSError as error:
                shared.health.report_failure(error)
                return False
            finally:
                shared.space.unreserve_bytes(overhead)
        shared.record_object(self)
        return True

    def summarize_files(self) -> fs.BlocksFileSummary | None:
        """What the files say now, for the records; None: no files, or given up."""
        with self._lock:
            files = self._files
            if files is None or self.is_retired:
                return None
            present = files.present_bytes()
            return fs.BlocksFileSummary(
                self.version,
                self.block_size,
                present,
                present + format.file_overhead(files.header),
                present == self._size,
                files.state,
            )

    def remember_verified_blocks(self) -> None:
        """Keep what was verified for the next open. By the store, before anybody can open the version anew."""
        files = self._files
        if files is not None and not self.is_retired:
            with contextlib.suppress(OSError):
                self._context.verified_blocks.entries[self.version.id] = (
                    _fingerprint(files),
                    bytearray(self._verified),
                )

    def close_files(self) -> None:
        """Close the files. By the store, after the last close and outside its lock."""
        with self._lock:
            files, self._files = self._files, None
            if self._reserved_bytes:
                self._context.space.unreserve_bytes(self._reserved_bytes)
                self._reserved_bytes = 0
            view, self._view = self._view, None
            mapping, self._mapping = self._mapping, None
            # a slice that a reply still holds keeps the mapping, and goes with it
            with contextlib.suppress(BufferError):
                if view is not None:
                    view.release()
                if mapping is not None:
                    mapping.close()
            if files is None:
                return
            try:
                if not self.is_retired:
                    self._mark_files_clean_locked(files)
            except OSError as error:
                self._context.health.report_failure(error)
            finally:
                files.close()

    def _mark_files_clean_locked(self, files: ObjectFiles) -> None:
        if self._is_unclean:
            self._context.ledger.flush_slot()
        state = files.state
        marked = bytes(map(bool, files.checksums))
        verified = bytes(self._verified)
        if (
            files.is_open_only_here()
            and marked == verified
            and not (state.is_clean and state.boot_id == self._context.boot_id)
        ):
            files.set_clean(True, self._context.boot_id)


def _fingerprint(files: ObjectFiles) -> tuple[int, int, int]:
    """Generation, repairs and mtime_ns of the data file: another one means that its bytes may be others."""
    return files.header.generation, files.state.repairs, os.fstat(files.read_fd).st_mtime_ns
