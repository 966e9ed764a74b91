"""Fills the blocks of one open object version: space for them, their bytes, their checksums."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from fusecache.blocks import block_length
from fusecache.errors import StoreError, StoreFullError
from fusecache.store.block_map import BlockMap
from fusecache.store.context import StoreContext
from fusecache.store.disk.files import ObjectFiles
from fusecache.store.disk.locks import BlockClaim
from fusecache.store.files_holder import FilesHolder
from fusecache.store.object_attestation import ObjectAttestation
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from typing_extensions import Buffer

_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


class ObjectWriter:
    """Writes blocks of one object version. Thread-safe; every method may block for disk I/O.

    A block takes these steps, and the crash table in ARCHITECTURE.md says what each leaves behind: `claim_blocks` (no
    other process fetches it), `reserve_bytes` (its space is counted, others are evicted for it), `write` (its bytes are
    in the data file), `commit_block` (it is counted as stored, and its checksum is set).

    The lock of the object (FilesHolder) guards the reservation and all changes to the files.
    """

    def __init__(
        self,
        version: ObjectVersion,
        context: StoreContext,
        *,
        blocks: BlockMap,
        holder: FilesHolder,
        attestation: ObjectAttestation,
    ) -> None:
        self.has_written = False
        """Bytes were written, maybe more than were committed."""
        self._version = version
        self._context = context
        self._blocks = blocks
        self._holder = holder
        self._attestation = attestation
        self._lock = holder.lock
        self._reserved_bytes = 0
        """Bytes that were reserved for this object, and not committed or given back yet."""

    def reserve_bytes(self, nbytes: int) -> bool:
        """Make sure that `nbytes` more can be written, evicting others; False: they can't, and the caller streams
        uncached. The first reservation makes the files."""
        if self._holder.is_retired:
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

    def _ensure_files(self) -> bool:
        holder = self._holder
        if holder.files is not None:
            return True
        if self._version.size == 0 or not self._context.health.ensure_usable():
            return False
        with self._lock:
            if not holder.open_or_create_locked():
                return False
            if not holder.is_created_here:
                self._attestation.adopt_locked()
        if holder.is_created_here:
            holder.record_summary()
        return True

    def claim_blocks(self, blocks: range) -> BlockClaim:
        """Claim the fetch of the longest obtainable prefix of `blocks` (ascending) against other processes.

        When the object can't be stored there is nothing to share, and all of `blocks` is granted. Blocks that another
        process committed before the claim was had are unverified then: the caller asks once more what is missing.
        """
        holder = self._holder
        if holder.is_retired or not self._ensure_files():
            return BlockClaim(blocks, None)
        files = holder.files
        assert files is not None
        try:
            return BlockClaim(files.claim_blocks(blocks), self._unclaim_blocks)
        except OSError as error:
            self._context.health.report_failure(error)
            return BlockClaim(blocks, None)

    def _unclaim_blocks(self, blocks: range) -> None:
        files = self._holder.files
        if files is not None:
            with contextlib.suppress(OSError):
                files.unclaim_blocks(blocks)

    def write(self, offset: int, data: Buffer) -> None:
        """Write bytes at `offset`; they count for nothing until their blocks are committed. Takes no lock.

        Raises StoreFullError when the disk is full and eviction did not help, StoreError on any other failure; the disk
        is bypassed from then on until it works again.
        """
        if self._blocks.is_complete:
            return  # a complete file may be served by passthrough and is never rewritten
        holder = self._holder
        files = holder.files
        if files is None or holder.is_retired:
            raise StoreError(f"{self._version.key}: no space was reserved in the cache")
        self.has_written = True
        try:
            fd = files.open_write_fd(self._context.cache_directory.data_path(self._version.id))
            self._write_all(fd, offset, memoryview(data).cast("B"))
        except FileNotFoundError as error:
            holder.retire()
            raise StoreError(f"{self._version.key}: the cache file was removed") from error
        except OSError as error:
            self._context.health.report_failure(error)
            kind = StoreFullError if error.errno in _FULL_ERRNOS else StoreError
            raise kind(self._describe(error)) from error

    def _write_all(self, fd: int, offset: int, view: memoryview) -> None:
        """Write all bytes; a full disk is retried once, after an eviction. Raises OSError."""
        done, is_retried = 0, False
        while done < len(view):
            try:
                done += os.pwrite(fd, view[done:], offset + done)
            except OSError as error:
                if (
                    error.errno not in _FULL_ERRNOS
                    or is_retried
                    or not self._context.space.evict_on_enospc(len(view) - done)
                ):
                    raise
                is_retried = True

    def _describe(self, error: OSError) -> str:
        return f"cache directory {self._context.cache_directory.path}: {error.strerror}"

    def commit_block(self, block: int, checksum: int) -> None:
        """Mark a block present whose bytes were all written; `checksum` is their block_checksum. In a retired object
        the block stays absent.

        Raises StoreError when that can't be recorded; the block is then absent.
        """
        holder = self._holder
        length = block_length(block, self._version.size, self._context.block_size)
        with self._lock:
            files = holder.files
            if files is not None and not holder.is_retired:
                try:
                    self._commit_locked(files, block, checksum, length)
                except OSError as error:
                    self._context.health.report_failure(error)
                    raise StoreError(self._describe(error)) from error
                return
        self.unreserve_bytes(length)

    def _commit_locked(self, files: ObjectFiles, block: int, checksum: int, length: int) -> None:
        self._lock.assert_held()
        ledger = self._context.ledger
        consumed = min(length, self._reserved_bytes)
        self._reserved_bytes -= consumed
        self._holder.mark_unclean_locked(files)
        counted = length if files.checksums[block] == 0 else 0
        ledger.count_committed(counted, consumed)
        try:
            files.set_checksum(block, checksum)
        finally:
            ledger.clear_pending(counted)
        self._blocks.mark_present_locked(block)

    def discard_bad_block(self, files: ObjectFiles, block: int, checksum: int) -> None:
        """The block's bytes do not match `checksum`: count it, and have it fetched again.

        If no other process has the object open, the checksum is cleared, and the block is fetched again in place.
        Otherwise that process may be serving it through passthrough, and a file that is being served is never
        rewritten: the object is retired, its files are unlinked, and the block is streamed uncached.
        """
        holder, context = self._holder, self._context
        with self._lock:
            self._blocks.mark_bad_locked(block)
            self._attestation.withdraw_locked()
            if holder.is_retired or files.checksums[block] != checksum:
                return
            try:
                is_alone = files.is_open_only_here()
                if is_alone:
                    with context.cache_directory.exclusive_lock():
                        files.count_repair()
                        files.clear_checksum(block)
                        context.ledger.count_evicted(
                            block_length(block, self._version.size, context.block_size)
                        )
                else:
                    holder.unlink_locked(files)
            except OSError as error:
                context.health.report_failure(error)
                holder.retire()
                is_alone = False
            if not is_alone:
                self._blocks.reject_locked(block)
        context.corruption_log.report_bad_block(self._version, block, is_cleared=is_alone)

    def close(self) -> None:
        """Give back what is reserved, and close the files. Store calls this after the last close, without its lock."""
        with self._lock:
            if self._reserved_bytes:
                self._context.space.unreserve_bytes(self._reserved_bytes)
                self._reserved_bytes = 0
            self._holder.close_locked()
