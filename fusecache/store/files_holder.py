"""The files of one open object version, as this process has them: opened or made, given up, closed."""

from __future__ import annotations

import contextlib
import operator
import os
import random
import time

from fusecache.locking import OwnedLock
from fusecache.store.block_map import BlockMap
from fusecache.store.context import StoreContext
from fusecache.store.disk import files as fs
from fusecache.store.disk import format
from fusecache.store.disk.files import BlocksFileSummary, ObjectFiles
from fusecache.store.records import record_from_summary
from fusecache.types import ObjectVersion


class FilesHolder:
    """Holds the files of one object version.

    | State | files | is_retired | How it gets there |
    |---|---|---|---|
    | none | None | False | first state; there are no files, or they can't be opened |
    | held | set | False | `open_locked` found some, or `open_or_create_locked` made them |
    | retired | set | True | the files were unlinked, or the store was closed: nothing more is written |
    | closed | None | any | `close_locked`, after the last close of the object |

    What this process verified of a retired object goes on being served from the unlinked file, the rest is streamed
    uncached, and the next open of the version starts new files.

    `lock` is the lock of the object: BlockMap, FilesHolder, ObjectAttestation and ObjectWriter of one object share it,
    and change under it only. It comes before the store's locks. It is never held across the I/O of blocks; it is held
    across the 8-byte pwrite of a checksum, so that a block is counted once.
    """

    def __init__(
        self, version: ObjectVersion, context: StoreContext, *, blocks: BlockMap, lock: OwnedLock
    ) -> None:
        self.lock = lock
        self.files: ObjectFiles | None = None
        self.is_retired = False
        self._version = version
        self._context = context
        self._blocks = blocks
        self._is_unclean = False
        """The header says that blocks may be unverified, and the ledger's slot may be behind."""
        self.is_created_here = False
        """This process made the files, so that the first access is the one that brings the object in."""
        self._is_access_counted = False

    # -- opening

    def open_locked(self) -> bool:
        """Open the files if there are any; returns whether they are open now."""
        self.lock.assert_held()
        if self.files is None and self._version.size:
            try:
                files = fs.open_object_files(
                    self._context.cache_directory,
                    self._version.id,
                    self._version.size,
                    self._context.block_size,
                )
            except OSError as error:
                self._context.health.report_failure(error)
                return False
            if files is not None:
                self._adopt_locked(files)
        return self.files is not None

    def _adopt_locked(self, files: ObjectFiles) -> None:
        self.lock.assert_held()
        context, state = self._context, files.state
        known = context.verified_blocks.entries.pop(self._version.id, None)
        marked = bytes(map(bool, files.checksums))
        verified = None
        if context.trusts_boot and state.is_clean and state.boot_id == context.boot_id:
            verified = marked
        elif known is not None and known[0] == _fingerprint(files):
            verified = bytes(map(operator.and_, known[1], marked))
        self.files = files
        self._blocks.adopt_locked(files.checksums, verified)

    def open_or_create_locked(self) -> bool:
        """Open the files, or make them, for which room is made; False: the disk does not take them."""
        self.lock.assert_held()
        if self.open_locked():
            return True
        context = self._context
        header = format.BlocksFileHeader(
            context.block_size,
            self._version.size,
            random.getrandbits(64),
            format.pack_identity(self._version),
        )
        overhead = format.file_overhead(header)
        if not context.space.reserve_bytes(overhead):
            return False
        try:
            with context.cache_directory.exclusive_lock() as is_locked:
                if not is_locked:
                    return False
                if self.open_locked():
                    return True
                if not fs.unlink_object_if_unused(context.cache_directory, self._version.id):
                    return False
                # counted before the files are there: a crash in between leaves the count too high
                context.ledger.count_committed(overhead, overhead)
                overhead, counted = 0, overhead
                try:
                    files = fs.create_object_files(
                        context.cache_directory, self._version, header, context.boot_id
                    )
                except OSError:
                    context.ledger.count_evicted(counted)
                    raise
                finally:
                    context.ledger.clear_pending(counted)
                self.files = files
                self._blocks.adopt_locked(files.checksums, None)
                self._is_unclean = self.is_created_here = True
                return True
        except OSError as error:
            context.health.report_failure(error)
            return False
        finally:
            context.space.unreserve_bytes(overhead)

    # -- while they are open

    def mark_unclean_locked(self, files: ObjectFiles) -> None:
        """Say in the header, before a block is committed, that blocks may be unverified. Raises OSError."""
        self.lock.assert_held()
        if not self._is_unclean:
            files.set_clean(False)
            self._is_unclean = True

    def count_access(self) -> None:
        """Count an access, once between first open and last close, and not the one that brings the object in. Blocks
        for a write to the header; a disk that fails is no error."""
        if self._is_access_counted:
            return
        with self.lock:
            self._is_access_counted = True
            files = self.files
            if files is not None:
                with contextlib.suppress(OSError):
                    files.set_last_use(
                        time.time_ns(), min(3, files.state.accesses + (not self.is_created_here))
                    )

    def record_summary(self) -> None:
        """Put what the files say now into the store's table, unless there are none, or they were given up."""
        with self.lock:
            files = self.files
            if files is None or self.is_retired:
                return
            present = files.present_bytes()
            summary = BlocksFileSummary(
                self._version,
                self._context.block_size,
                present,
                present + format.file_overhead(files.header),
                files.state,
            )
        self._context.object_table.put_record(self._version.id, record_from_summary(summary))

    # -- giving them up

    def retire(self) -> None:
        """Write nothing more to the files."""
        self.is_retired = True

    def unlink_locked(self, files: ObjectFiles) -> None:
        """Retire the object and unlink its files, unless another process did so already and maybe made new ones. Raises
        OSError."""
        self.lock.assert_held()
        stored = files.present_bytes() + format.file_overhead(files.header)
        self.is_retired = True
        cache_directory = self._context.cache_directory
        with cache_directory.exclusive_lock() as is_locked:
            if is_locked and files.is_at(cache_directory.data_path(self._version.id)):
                fs.unlink_object(cache_directory, self._version.id)
                self._context.ledger.count_evicted(stored)

    def remember_verified_blocks(self) -> None:
        """Keep what was verified for the next open. OpenObjects calls this before the version can be opened anew."""
        files = self.files
        if files is not None and not self.is_retired:
            with contextlib.suppress(OSError):
                self._context.verified_blocks.entries[self._version.id] = (
                    _fingerprint(files),
                    bytearray(self._blocks.verified),
                )

    def close_locked(self) -> None:
        """Close the files, and say in their header if all of their blocks are verified. A disk that fails is no
        error."""
        self.lock.assert_held()
        files, self.files = self.files, None
        if files is None:
            return
        try:
            if not self.is_retired:
                self._mark_clean_locked(files)
        except OSError as error:
            self._context.health.report_failure(error)
        finally:
            self._blocks.detach_locked()
            files.close()

    def _mark_clean_locked(self, files: ObjectFiles) -> None:
        self.lock.assert_held()
        boot_id, state = self._context.boot_id, files.state
        if self._is_unclean:
            self._context.ledger.flush_slot()
        if (
            files.is_open_only_here()
            and self._blocks.marked_blocks() == self._blocks.verified
            and not (state.is_clean and state.boot_id == boot_id)
        ):
            files.set_clean(True, boot_id)


def _fingerprint(files: ObjectFiles) -> tuple[int, int, int]:
    """Generation, repairs and mtime_ns of the data file: another one means that its bytes may be others."""
    return files.header.generation, files.state.repairs, os.fstat(files.read_fd).st_mtime_ns
