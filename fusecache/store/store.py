"""The node's block store: which object versions are in the cache directory, room for more, and which have to go.

Promises: a byte that it serves was verified against its checksum by this process; the byte limit and the free-space
floor hold at all times, over all processes on the directory; kill -9 at any instant leaves a valid store; a broken disk
is never an error to a reader. It does not fetch anything.

Lock order: the lock of a StoredObject, the lock of OpenObjects, the directory's lock, then those of ObjectTable, Space
and Ledger. Space holds its eviction lock across the directory's, and takes no object's lock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from fusecache.errors import ConfigError, StoreError
from fusecache.store.attestation import AttestationPolicy
from fusecache.store.context import StoreContext, VerifiedBlocks
from fusecache.store.corruption import CorruptionLog
from fusecache.store.disk import files as fs
from fusecache.store.disk.directory import open_ledger, prepare_directory, read_boot_id
from fusecache.store.disk.format import AttestationState
from fusecache.store.evictor import Evictor
from fusecache.store.folder_scan import SCAN_TIMEOUT, FolderScan, ScanProgress
from fusecache.store.health import DiskHealth
from fusecache.store.info import ObjectInfo, StoreUsage
from fusecache.store.object import StoredObject
from fusecache.store.open_objects import OpenObjects
from fusecache.store.records import ObjectRecord, ObjectTable, record_from_summary
from fusecache.store.scan import Scanner
from fusecache.store.space import Space
from fusecache.types import ObjectId, ObjectVersion


class Store:
    """The store in `directory`, which is made if its parent exists.

    `limit` and `free_floor` are in bytes: at most so much is stored, and at least so much is left free on the disk.
    `verify`: "start" hashes each block found on the disk before its first use by this process, "boot" only after a
    reboot or when the object was not closed cleanly, "always" is like "start" here (the channel asks again per read).
    `attestation_policy`: which objects have to be attested, if any do. `is_in_memory`: the directory is on a tmpfs,
    says `usage`. `is_spare(version)`: another node keeps a copy for longer, so that this one goes first when there is
    no room; called from any thread, often. Raises StoreError, or ConfigError, in one line that names the directory and
    the way out.

    Thread-safe. All methods but `version_of`, `is_open` and the properties may block for disk I/O.
    """

    def __init__(
        self,
        directory: Path,
        *,
        limit: int,
        free_floor: int,
        block_size: int = 1 << 20,
        verify: Literal["start", "boot", "always"] = "start",
        attestation_policy: AttestationPolicy | None = None,
        is_in_memory: bool = False,
        is_spare: Callable[[ObjectVersion], bool] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.block_size = block_size
        self._is_in_memory = is_in_memory
        if limit <= 0 or free_floor < 0 or block_size <= 0:
            raise ConfigError(f"cache directory {directory}: cache_size and block_size must be above 0")
        self._cache_directory = prepare_directory(self.directory, block_size)
        try:
            self._ledger = open_ledger(self._cache_directory)
        except BaseException:
            self._cache_directory.close()
            raise
        self._health = DiskHealth(self.directory)
        self._object_table = ObjectTable()
        self._corruption_log = CorruptionLog(self.directory, self._object_table)
        self._verified_blocks = VerifiedBlocks()
        self._open_objects = OpenObjects(self.directory)
        self._progress = ScanProgress()
        self._folder_scan = FolderScan(
            cache_directory=self._cache_directory,
            health=self._health,
            object_table=self._object_table,
            open_objects=self._open_objects,
            progress=self._progress,
        )
        self._evictor = Evictor(
            cache_directory=self._cache_directory,
            ledger=self._ledger,
            object_table=self._object_table,
            open_objects=self._open_objects,
            verified_blocks=self._verified_blocks,
            folder_scan=self._folder_scan,
            is_spare=is_spare,
        )
        self._space = Space(
            self.directory,
            self._ledger,
            self._health,
            limit=limit,
            free_floor=free_floor,
            make_room=self._evictor.make_room,
            scan_finished=self._progress.scan_finished,
        )
        self._context = StoreContext(
            cache_directory=self._cache_directory,
            ledger=self._ledger,
            health=self._health,
            space=self._space,
            object_table=self._object_table,
            corruption_log=self._corruption_log,
            verified_blocks=self._verified_blocks,
            block_size=block_size,
            boot_id=read_boot_id(),
            trusts_boot=verify == "boot",
            attestation_policy=attestation_policy,
        )
        self._scanner = Scanner(
            cache_directory=self._cache_directory,
            ledger=self._ledger,
            health=self._health,
            object_table=self._object_table,
            folder_scan=self._folder_scan,
            space=self._space,
        )
        self._scanner.start()

    @property
    def directories(self) -> Sequence[Path]:
        """The cache directory."""
        return (self.directory,)

    # -- opening

    def open(self, version: ObjectVersion) -> StoredObject:
        """Open an object version; while it is open it is never evicted. One StoredObject per version is shared by all
        openers in this process; each closes it once. Files are made when space is first reserved. Raises StoreError
        after `close`."""
        return self._open_objects.open(version, self._make_object)

    def _make_object(self, version: ObjectVersion) -> StoredObject:
        return StoredObject(version, self._context, self._close_object)

    def open_in_place(self, version: ObjectVersion) -> contextlib.closing[StoredObject]:
        """While this is entered, the version is open: there is only one place for it. Raises StoreError after
        `close`."""
        return contextlib.closing(self.open(version))

    def _close_object(self, stored: StoredObject) -> None:
        if not self._open_objects.release(stored):
            return
        stored.files.record_summary()
        stored.writer.close()
        if stored.writer.has_written and not stored.is_complete:
            try:
                fs.free_uncommitted_space(self._cache_directory, stored.version.id)
            except OSError as error:
                self._health.report_failure(error)
        self._space.clear_backoff()

    def is_open(self, object_id: ObjectId) -> bool:
        """Whether this process has the object open."""
        return self._open_objects.is_open(object_id)

    def has_whole(self, version: ObjectVersion) -> bool:
        """Whether all of a version is here and may be given to anybody at once, as far as can be told without opening
        it: it is open, or was when this process closed it, and its files are still there. One look at the disk."""
        stored = self._open_objects.get(version.id)
        if stored is not None:
            return stored.is_servable and not stored.is_retired
        known = self._verified_blocks.entries.get(version.id)
        if known is None or 0 in known[1] or self._context.attestation_policy is not None:
            return False
        return self._cache_directory.blocks_path(version.id).exists()

    # -- what has to go, and what stays

    def evict(self, object_id: ObjectId) -> int:
        """Evict one object; returns the bytes freed, 0 if it is not here. Raises StoreError when it is pinned or in use
        by this or any other process."""
        try:
            freed = self._evictor.evict_object(object_id, is_forced=True)
            if freed:
                return freed
            summary = fs.read_summary(self._cache_directory, object_id)
        except OSError as error:
            raise self._failed(error) from error
        if summary is None:
            return 0
        if summary.state.is_pinned:
            raise StoreError(f"{summary.version.key} is pinned: unpin it first")
        raise StoreError(f"{summary.version.key} is in use: close the programs that read it first")

    def set_pinned(self, object_id: ObjectId, is_pinned: bool) -> None:
        """Keep an object from eviction, in all processes and after restarts, or let it go again. Raises StoreError when
        nothing of it is in the store."""
        try:
            is_found = fs.write_pinned(self._cache_directory, object_id, is_pinned)
            summary = fs.read_summary(self._cache_directory, object_id)
        except OSError as error:
            raise self._failed(error) from error
        if not is_found or summary is None:
            raise StoreError(f"object {object_id} is not in the cache: read it first")
        self._object_table.put_record(object_id, record_from_summary(summary))
        self._space.clear_backoff()

    def _failed(self, error: OSError) -> StoreError:
        self._health.report_failure(error)
        return StoreError(f"cache directory {self.directory}: {error.strerror}")

    # -- what is there

    def present_bytes(self, object_id: ObjectId) -> int:
        """Bytes of an object that are here, by its files. 0, too, if the disk does not tell."""
        try:
            summary = fs.read_summary(self._cache_directory, object_id)
        except OSError as error:
            self._health.report_failure(error)
            return 0
        return summary.present_bytes if summary is not None else 0

    def version_of(self, object_id: ObjectId) -> ObjectVersion | None:
        """The version with this id, if something of it is in the store."""
        record = self._object_table.get(object_id)
        return None if record is None else record.version

    def objects(self) -> list[ObjectInfo]:
        """Every object version in the store, of all processes, as far as the index and the background scan know. Waits
        some seconds at most for the index to be read."""
        self._progress.index_loaded.wait(SCAN_TIMEOUT)
        return self._object_infos()

    def _object_infos(self) -> list[ObjectInfo]:
        opened = self._open_objects.snapshot()
        infos = []
        for object_id, record in self._object_table.snapshot():
            stored, open_count = opened.get(object_id, (None, 0))
            present = record.present_bytes if stored is None else stored.cached_bytes()
            infos.append(_object_info(object_id, record, present, open_count, self._is_in_memory))
        return infos

    def usage(self) -> StoreUsage:
        """Figures for `fusecache status`. Just after the start they lack what the index did not tell yet."""
        complete = partial = quarantined = 0
        for info in self._object_infos():
            is_quarantined = info.attestation_state is AttestationState.QUARANTINED
            complete += info.is_complete
            quarantined += is_quarantined
            partial += not info.is_complete and not is_quarantined
        used, limit = self._ledger.used_bytes(), self._space.limit
        return StoreUsage(
            used=used,
            limit=limit,
            objects_complete=complete,
            objects_partial=partial,
            evictions=self._evictor.eviction_count,
            corrupt_blocks=self._corruption_log.corrupt_block_count,
            sick=self._health.is_sick,
            objects_quarantined=quarantined,
            memory_used=used if self._is_in_memory else 0,
            memory_limit=limit if self._is_in_memory else 0,
        )

    def wait_for_scan(self, timeout: float) -> bool:
        """Wait until the background scan has seen every object; False after `timeout` seconds."""
        return self._progress.scan_finished.wait(timeout)

    # -- the end

    def close(self) -> None:
        """Flush the index and let the directory go. Objects still open stay readable, but nothing more is stored."""
        if not self._open_objects.close():
            return
        self._scanner.stop(SCAN_TIMEOUT)
        self._ledger.close()
        self._cache_directory.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


_TOLD_STATES = (AttestationState.ATTESTED, AttestationState.QUARANTINED)


def _object_info(
    object_id: ObjectId, record: ObjectRecord, present_bytes: int, open_count: int, is_in_memory: bool
) -> ObjectInfo:
    state = record.attestation_state
    return ObjectInfo(
        object_id,
        record.version,
        present_bytes,
        record.is_pinned,
        record.last_use_ns / 1e9,
        open_count,
        AttestationState(state) if state in _TOLD_STATES else AttestationState.NONE,
        is_in_memory,
    )
