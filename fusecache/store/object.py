"""One object version in the store, open: which blocks are there, and the bytes of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import xxhash

from fusecache.blocks import block_length
from fusecache.checksum import block_checksum
from fusecache.errors import StoreError
from fusecache.locking import OwnedLock
from fusecache.store.block_map import BlockMap
from fusecache.store.context import StoreContext
from fusecache.store.disk.locks import BlockClaim
from fusecache.store.files_holder import FilesHolder
from fusecache.store.object_attestation import ObjectAttestation
from fusecache.store.object_writer import ObjectWriter
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from typing_extensions import Buffer

_hash_buffers = threading.local()
"""`buffer`: a bytearray into which this thread reads the block that it hashes."""


class StoredObject:
    """An open object version of a Store, which makes one for all who have the version open in this process.
    Thread-safe.

    The facade of four parts, which share one lock (FilesHolder): `blocks` (what is there), `attestation` (whether
    anybody may have it), `writer` (fills it) and `files` (its files). `on_close` is called for each close.
    """

    def __init__(
        self, version: ObjectVersion, context: StoreContext, on_close: Callable[[StoredObject], None]
    ) -> None:
        self.version = version
        self.block_size = context.block_size
        self._context = context
        self._on_close = on_close
        self._size = version.size
        lock = OwnedLock()
        self.blocks = BlockMap(version.size, context.block_size, lock)
        self.block_count = self.blocks.block_count
        self.files = FilesHolder(version, context, blocks=self.blocks, lock=lock)
        self.attestation = ObjectAttestation(version, context, blocks=self.blocks, holder=self.files)
        self.writer = ObjectWriter(
            version, context, blocks=self.blocks, holder=self.files, attestation=self.attestation
        )
        with lock:
            if self.files.open_locked():
                self.attestation.adopt_locked()

    # -- what is there: none of these takes a lock or blocks

    @property
    def is_complete(self) -> bool:
        """Every block is present: in the data file, and this process wrote or verified it."""
        return self.blocks.is_complete

    @property
    def is_unattested(self) -> bool:
        """Nobody may be given its bytes yet, present or not."""
        return self.attestation.is_unattested

    @property
    def is_servable(self) -> bool:
        """All of it may be given to anybody."""
        return self.blocks.is_complete and not self.attestation.is_unattested

    @property
    def is_retired(self) -> bool:
        """Its files were given up: nothing more is written."""
        return self.files.is_retired

    @property
    def missing_block_count(self) -> int:
        """How many blocks are not present."""
        return self.blocks.missing_block_count

    # the channel asks these two for each READ: they read the map's state, and call nothing

    def is_present(self, block: int) -> bool:
        """Whether the block is in the data file, and this process wrote or verified it."""
        return self.blocks.verified[block] == 1

    def is_range_servable(self, offset: int, length: int) -> bool:
        """Whether all blocks of the bytes [offset, offset + length), as far as the object has them, are present, and
        may be given to anybody."""
        if self.attestation.is_unattested:
            return False
        blocks = self.blocks
        if blocks.is_complete:
            return True
        end = min(offset + length, self._size)
        if offset >= end:
            return True
        size = self.block_size
        return blocks.verified.find(0, offset // size, (end - 1) // size + 1) < 0

    def is_unverified(self, block: int) -> bool:
        """Whether the block is in the data file, and this process has yet to verify it."""
        return self.blocks.is_unverified(block)

    def cached_bytes(self) -> int:
        """Bytes of the blocks that are in the data file, verified or not."""
        if self.blocks.is_complete:
            return self.version.size
        files = self.files.files
        return 0 if files is None else files.present_bytes()

    def room_without_eviction(self, kept_share: float) -> int:
        """Bytes that can be stored in the place of this object without evicting anything, and with this share of the
        limit left over."""
        return self._context.space.room_without_eviction(kept_share)

    def fileno(self) -> int:
        """Read-only descriptor of the data file, whose shared lock keeps the file from eviction as long as any copy of
        the descriptor is open, a FUSE passthrough backing's included. Raises StoreError when there is no file."""
        files = self.files.files
        if files is None:
            raise StoreError(f"{self.version.key}: nothing of it is in the cache")
        return files.read_fd

    # -- verification

    def verify_block(self, block: int) -> bool:
        """Read and hash a block: True makes it present; a bad or unreadable one is discarded and counted. Blocks for
        disk I/O."""
        files = self.files.files
        if files is None:
            return False
        length = block_length(block, self.version.size, self.block_size)
        # a checksum that another process is just writing or clearing may be read torn: bad only if it stays
        for _ in range(3):
            expected = files.checksums[block]
            if expected == 0:
                # another process cleared it: what this one wrote or verified itself still holds
                return self.is_present(block)
            try:
                actual = _hash_range(files.read_fd, block * self.block_size, length)
            except OSError as error:
                self._context.health.report_failure(error)
                actual = None
            if actual == expected:
                with self.files.lock:
                    self.blocks.mark_present_locked(block)
                return True
            if files.checksums[block] == expected:
                break
        self.writer.discard_bad_block(files, block, expected)
        return False

    # -- filling: ObjectWriter's methods, for those who fetch

    def reserve_bytes(self, nbytes: int) -> bool:
        """Make sure that `nbytes` more can be written, evicting others; False: they can't, and the caller streams
        uncached. Blocks for disk I/O."""
        return self.writer.reserve_bytes(nbytes)

    def unreserve_bytes(self, nbytes: int) -> None:
        """Give reserved bytes back that will not be committed."""
        self.writer.unreserve_bytes(nbytes)

    def write(self, offset: int, data: Buffer) -> None:
        """Write bytes at `offset`; they count for nothing until their blocks are committed. Blocks for disk I/O.
        Raises StoreFullError when the disk is full and eviction did not help, StoreError on any other failure."""
        self.writer.write(offset, data)

    def commit_block(self, block: int, checksum: int) -> None:
        """Mark a block present whose bytes were all written; `checksum` is their block_checksum. Raises StoreError when
        that can't be recorded. The block stays absent then, and in a retired object."""
        self.writer.commit_block(block, checksum)

    def claim_blocks(self, blocks: range) -> BlockClaim:
        """Claim the fetch of the longest obtainable prefix of `blocks` (ascending) against other processes. Blocks of
        it may be unverified then: the caller asks once more what is missing."""
        return self.writer.claim_blocks(blocks)

    # -- use

    def count_access(self) -> None:
        """Count an access, once between first open and last close, and not the one that brings the object in."""
        self.files.count_access()

    def close(self) -> None:
        """Drop one open; the last one closes the files. Blocks for disk I/O."""
        self._on_close(self)


def _hash_range(fd: int, offset: int, length: int) -> int | None:
    """The block_checksum of these bytes of a file; None: the file ends before. Raises OSError."""
    buffer: bytearray | None = getattr(_hash_buffers, "buffer", None)
    if buffer is None or len(buffer) < length:
        buffer = _hash_buffers.buffer = bytearray(length)
    with memoryview(buffer)[:length] as view:
        done = 0
        while done < length:
            got = os.preadv(fd, [view[done:]], offset + done)
            if got == 0:
                return None
            done += got
        # update() lets the GIL go, the one-shot functions don't
        digest = xxhash.xxh3_64()
        digest.update(view)
        return block_checksum(digest)
