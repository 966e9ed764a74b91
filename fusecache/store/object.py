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

from fusecache.blocks import block_bytes, block_count
from fusecache.errors import StoreError, StoreFullError
from fusecache.store import files as fs
from fusecache.store import format
from fusecache.store.files import ObjectFiles
from fusecache.store.format import Mark, Seal
from fusecache.store.locks import Claim
from fusecache.store.seals import put_into_quarantine
from fusecache.store.shared import Shared
from fusecache.types import ObjectVersion

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class StoredObject:
    """An open object version of a Store; see there. Thread-safe; shared by all who open the version in this
    process."""

    def __init__(self, version: ObjectVersion, shared: Shared) -> None:
        self.version = version
        self.block_size = shared.block_size
        self.block_count = block_count(version.size, shared.block_size)
        self.open_count = 0
        """Guarded by the store's lock."""
        self.retired = False
        """Its files were given up: nothing more is written."""
        self._shared = shared
        self._size = version.size
        self._lock = threading.RLock()
        self._files: ObjectFiles | None = None
        self._verified = bytearray(self.block_count)
        self._missing = self.block_count
        self.complete = self._missing == 0
        """Every block is present. A plain attribute: it is read for each READ."""
        self.sealed = shared.seals is not None and not shared.seals.exempt(version)
        """Nobody is to be given its bytes yet. A plain attribute, too."""
        self.quarantined: bytes | None = None
        """The sha256 that it was found to have, against its manifest."""
        self.discards = 0
        """Blocks that were found bad since it was opened."""
        self._bad: set[int] = set()
        """Blocks of a retired object that still have a checksum and must not be tried again."""
        self.wrote = False
        """Bytes were written, maybe more than were committed."""
        self._dirty = False
        self._reserved = 0
        self._mapping: mmap.mmap | None = None
        self._view: memoryview | None = None
        self._touched = False
        self._created = False
        with self._lock:
            self._attach()

    # -- questions, lock-free

    def present(self, block: int) -> bool:
        """Whether the block is in the data file and was verified, or written, by this process."""
        return self._verified[block] == 1

    def unverified(self, block: int) -> bool:
        """Whether the block is in the data file but was not verified by this process yet."""
        files = self._files
        if files is None or self._verified[block] or files.sums[block] == 0:
            return False
        return block not in self._bad

    def checksum(self, block: int) -> int:
        """xxh3_64 of a block in the data file, 0 for none."""
        files = self._files
        return 0 if files is None else files.sums[block]

    def covered(self, offset: int, length: int) -> bool:
        """Whether all blocks of the bytes [offset, offset + length), as far as the object has them, are
        present, and it is not sealed."""
        if self.sealed:
            return False
        if self.complete:
            return True
        end = min(offset + length, self._size)
        if offset >= end:
            return True
        size = self.block_size
        return self._verified.find(0, offset // size, (end - 1) // size + 1) < 0

    def cached_bytes(self) -> int:
        """Bytes of the blocks that are in the data file, verified or not."""
        if self.complete:
            return self._size
        files = self._files
        return 0 if files is None else files.present_bytes()

    @property
    def ready(self) -> bool:
        """Whether all of it may be given to anybody."""
        return self.complete and not self.sealed

    @property
    def missing(self) -> int:
        """How many blocks are not present."""
        return self._missing

    def room(self, keeping: float) -> int:
        """See Space: where this object is."""
        return self._shared.space.room(keeping)

    # -- verification

    def verify(self, block: int) -> bool:
        """Read and hash a block: True makes it present; a bad or unreadable one is discarded and counted."""
        files = self._files
        if files is None:
            return False
        length = block_bytes(block, self._size, self.block_size)
        # a checksum that another process is just writing or clearing may be read torn: bad only if it stays
        for _ in range(3):
            expected = files.sums[block]
            if expected == 0:
                # another process cleared it: what this one wrote or verified itself still holds
                return self.present(block)
            try:
                actual = self._hash(files, block, length)
            except OSError as error:
                self._shared.health.failed(error)
                actual = None
            if actual == expected:
                self._mark(block)
                return True
            if files.sums[block] == expected:
                break
        self._discard(files, block, expected)
        return False

    def _hash(self, files: ObjectFiles, block: int, length: int) -> int | None:
        buffers = self._shared.buffers
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
            return digest.intdigest() or 1

    def _mark(self, block: int) -> None:
        with self._lock:
            if not self._verified[block]:
                self._verified[block] = 1
                self._missing -= 1
                if self._missing == 0:
                    self.complete = True

    def _discard(self, files: ObjectFiles, block: int, expected: int) -> None:
        with self._lock:
            self.discards += 1
            if self._verified[block]:
                self._verified[block] = 0
                self._missing += 1
                self.complete = False
            self.sealed = self._seals(None)[0]
            if self.retired or files.sums[block] != expected:
                return
            try:
                alone = files.alone()
                if alone:
                    with self._shared.layout.exclusive():
                        files.count_repair()
                        files.clear_checksum(block)
                        self._shared.ledger.evict(block_bytes(block, self._size, self.block_size))
                else:
                    self._retire(files)
            except OSError as error:
                self._shared.health.failed(error)
                self.retired = True
                alone = False
            if self.retired:
                self._bad.add(block)
        self._shared.corrupt(self, block, alone)

    def _retire(self, files: ObjectFiles) -> None:
        """Unlink the files, unless another process did so already and maybe made new ones."""
        stored = files.present_bytes() + format.overhead(files.header)
        self.retired = True
        with self._shared.layout.exclusive() as locked:
            if locked and files.at(self._shared.layout.data_path(self.version.id)):
                fs.discard(self._shared.layout, self.version.id)
                self._shared.ledger.evict(stored)

    # -- the whole

    def attest(self, sha256: bytes) -> None:
        """Somebody vouches for all of its bytes, which are here: break the seal."""
        seals = self._shared.seals
        with self._lock:
            if seals is None or not self.complete or self.quarantined is not None:
                return
            self.sealed = False
            if self._files is not None and not self.retired:
                try:
                    self._files.set_seal(Seal(Mark.ATTESTED, sha256, seals.anchor))
                except OSError as error:  # it is asked for again after the next start
                    self._shared.health.failed(error)
        self._shared.record(self)

    def quarantine(self, sha256: bytes) -> None:
        """Its bytes are not what they have to be: give them up, and leave the mark in their place."""
        shared = self._shared
        with self._lock:
            files = self._files
            self.quarantined = sha256
            if files is None or shared.seals is None or self.retired:
                return
            seal = Seal(Mark.QUARANTINED, sha256, shared.seals.anchor)
            try:
                put_into_quarantine(shared.layout, shared.ledger, self.version, files, seal)
            except OSError as error:
                shared.health.failed(error)
            # only now: from here on the version is opened anew, and the mark has to be there
            self.retired = True
        shared.quarantined(self)

    def lift(self) -> None:
        """End a quarantine: the manifest says something else now."""
        with self._lock:
            self.quarantined = None
            if self._files is not None:
                try:
                    self._files.set_seal(Seal())
                except OSError as error:
                    self._shared.health.failed(error)

    def _seals(self, files: ObjectFiles | None) -> tuple[bool, bytes | None]:
        seals = self._shared.seals
        return (False, None) if seals is None else seals.state(self.version, files)

    # -- filling

    def reserve(self, nbytes: int) -> bool:
        """Make sure that `nbytes` more can be written, evicting others; False: the caller streams
        uncached."""
        if self.retired:
            return False
        if not self._ensure_files() or not self._shared.space.reserve(nbytes):
            return False
        with self._lock:
            self._reserved += nbytes
        return True

    def unreserve(self, nbytes: int) -> None:
        """Give reserved bytes back that will not be committed."""
        with self._lock:
            nbytes = min(nbytes, self._reserved)
            self._reserved -= nbytes
        self._shared.space.unreserve(nbytes)

    def write(self, offset: int, data: Buffer) -> None:
        """Write bytes at `offset`; they count for nothing until their blocks are committed.

        Raises StoreFullError when the disk is full and eviction did not help, StoreError on any other
        failure; the disk is bypassed from then on until it works again.
        """
        if self.complete:
            return  # a complete file may be served by passthrough and is never rewritten
        files = self._files
        if files is None or self.retired:
            raise StoreError(f"{self.version.key}: no space was reserved in the cache")
        view = memoryview(data).cast("B")
        retried = False
        self.wrote = True
        try:
            fd = files.write_fd(self._shared.layout.data_path(self.version.id))
            with self._shared.writing(len(view)):
                done = 0
                while done < len(view):
                    try:
                        done += os.pwrite(fd, view[done:], offset + done)
                    except OSError as error:
                        if (
                            error.errno not in _FULL
                            or retried
                            or not self._shared.space.relieve(len(view) - done)
                        ):
                            raise
                        retried = True
        except FileNotFoundError as error:
            self.retired = True
            raise StoreError(f"{self.version.key}: the cache file was removed") from error
        except OSError as error:
            self._shared.health.failed(error)
            kind = StoreFullError if error.errno in _FULL else StoreError
            raise kind(f"cache directory {self._shared.layout.directory}: {error.strerror}") from error

    def commit(self, block: int, checksum: int) -> None:
        """Mark a block present whose bytes were all written; `checksum` is their xxh3_64_intdigest.

        Raises StoreError when that can't be recorded; the block is then absent.
        """
        files = self._files
        length = block_bytes(block, self._size, self.block_size)
        with self._lock:
            if files is None or self.retired:
                self.unreserve(length)
                return
            consumed = min(length, self._reserved)
            self._reserved -= consumed
            try:
                if not self._dirty:
                    files.set_clean(False)
                    self._dirty = True
                fresh = files.sums[block] == 0
                counted = length if fresh else 0
                self._shared.ledger.commit(counted, consumed)
                try:
                    files.set_checksum(block, checksum)
                finally:
                    self._shared.ledger.marked(counted)
            except OSError as error:
                self._shared.health.failed(error)
                raise StoreError(
                    f"cache directory {self._shared.layout.directory}: {error.strerror}"
                ) from error
            self._mark(block)

    def claim(self, blocks: range) -> Claim:
        """Claim the fetch of the longest obtainable prefix of `blocks` (ascending) against other processes.

        When the object can't be stored there is nothing to share, and all of `blocks` is granted. Blocks
        that another process committed before the claim was had are `unverified` then: look again.
        """
        if self.retired or not self._ensure_files():
            return Claim(blocks, None)
        files = self._files
        assert files is not None
        try:
            return Claim(files.claim(blocks), self._unclaim)
        except OSError as error:
            self._shared.health.failed(error)
            return Claim(blocks, None)

    def _unclaim(self, blocks: range) -> None:
        files = self._files
        if files is not None:
            with contextlib.suppress(OSError):
                files.unclaim(blocks)

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
                        self._shared.health.failed(error)
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

    def touch(self) -> None:
        """Count an access, once between first open and last close, and not the one that brings the object
        in."""
        if self._touched:
            return
        with self._lock:
            self._touched = True
            files = self._files
            if files is not None:
                with contextlib.suppress(OSError):
                    files.set_use(time.time_ns(), min(3, files.state.accesses + (not self._created)))

    def close(self) -> None:
        """Drop one open; the last one closes the files."""
        self._shared.closed(self)

    # -- called by the store

    def _attach(self) -> bool:
        """Open the files if there are any."""
        if self._files is None and self._size:
            try:
                files = fs.attach(self._shared.layout, self.version.id, self._size, self.block_size)
            except OSError as error:
                self._shared.health.failed(error)
                return False
            if files is not None:
                self._adopt(files)
        return self._files is not None

    def _adopt(self, files: ObjectFiles) -> None:
        state = files.state
        known = self._shared.memory.entries.pop(self.version.id, None)
        if self._shared.trust_boot and state.clean and state.boot_id == self._shared.boot_id:
            self._verified[:] = bytes(map(bool, files.sums))
        elif known is not None and known[0] == _fingerprint(files):
            self._verified[:] = bytes(map(operator.and_, known[1], map(bool, files.sums)))
        self._missing = self._verified.count(0)
        self.sealed, self.quarantined = self._seals(files)
        self._files = files
        self.complete = self._missing == 0

    def _ensure_files(self) -> bool:
        if self._files is not None:
            return True
        shared = self._shared
        if self._size == 0 or not shared.health.usable():
            return False
        with self._lock:
            if self._attach():
                return True
            header = format.Header(
                self.block_size, self._size, random.getrandbits(64), format.pack_identity(self.version)
            )
            overhead = format.overhead(header)
            if not shared.space.reserve(overhead):
                return False
            try:
                with shared.layout.exclusive() as locked:
                    if not locked:
                        return False
                    if self._attach():
                        return True
                    if not fs.discard_unused(shared.layout, self.version.id):
                        return False
                    # counted before the files are there: a crash in between leaves the count too high
                    shared.ledger.commit(overhead, overhead)
                    overhead, counted = 0, overhead
                    try:
                        self._files = fs.create(shared.layout, self.version, header, shared.boot_id)
                    except OSError:
                        shared.ledger.evict(counted)
                        raise
                    finally:
                        shared.ledger.marked(counted)
                    self._dirty = self._created = True
            except OSError as error:
                shared.health.failed(error)
                return False
            finally:
                shared.space.unreserve(overhead)
        shared.record(self)
        return True

    def summary(self) -> fs.Summary | None:
        """What the files say now, for the records; None: no files, or given up."""
        with self._lock:
            files = self._files
            if files is None or self.retired:
                return None
            present = files.present_bytes()
            return fs.Summary(
                self.version,
                self.block_size,
                present,
                present + format.overhead(files.header),
                present == self._size,
                files.state,
            )

    def remember(self) -> None:
        """Keep what was verified for the next open. By the store, before anybody can open the version anew."""
        files = self._files
        if files is not None and not self.retired:
            with contextlib.suppress(OSError):
                self._shared.memory.entries[self.version.id] = (
                    _fingerprint(files),
                    bytearray(self._verified),
                )

    def release(self) -> None:
        """Close the files. By the store, after the last close and outside its lock."""
        with self._lock:
            files, self._files = self._files, None
            if self._reserved:
                self._shared.space.unreserve(self._reserved)
                self._reserved = 0
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
                if not self.retired:
                    self._leave(files)
            except OSError as error:
                self._shared.health.failed(error)
            finally:
                files.close()

    def _leave(self, files: ObjectFiles) -> None:
        if self._dirty:
            self._shared.ledger.settle()
        state = files.state
        marked = bytes(map(bool, files.sums))
        verified = bytes(self._verified)
        if (
            files.alone()
            and marked == verified
            and not (state.clean and state.boot_id == self._shared.boot_id)
        ):
            files.set_clean(True, self._shared.boot_id)


def _fingerprint(files: ObjectFiles) -> tuple[int, int, int]:
    """Generation, repairs and mtime_ns of the data file: another one means that its bytes may be others."""
    return files.header.generation, files.state.repairs, os.fstat(files.read_fd).st_mtime_ns
