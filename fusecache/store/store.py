"""The node's block store: which object versions are in the cache directory, room for more, and who has to go.

Promises: a byte that it serves was verified against its checksum by this process; the byte limit and the
free-space floor hold at all times, over all processes on the directory; kill -9 at any instant leaves a
valid store; a broken disk is never an error to a reader. It does not fetch anything.

Lock order: a StoredObject's lock, then `_lock`, then those of Records, Space and Ledger. `_lock` guards the
table of open objects and is never held across I/O other than opening two files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from fusecache.errors import ConfigError, StoreError
from fusecache.store.attestation import AttestationPolicy
from fusecache.store.context import StoreContext, VerifiedBlocks
from fusecache.store.disk import files as fs
from fusecache.store.disk import format
from fusecache.store.disk.files import CacheDirectory
from fusecache.store.disk.format import AttestationState
from fusecache.store.disk.ledger import Ledger
from fusecache.store.health import DiskHealth
from fusecache.store.info import ObjectInfo, StoreUsage
from fusecache.store.object import StoredObject
from fusecache.store.records import ObjectTable, record_from_summary
from fusecache.store.scan import Scanner
from fusecache.store.space import Space
from fusecache.types import ObjectId, ObjectVersion

_log = logging.getLogger(__name__)

_SCAN_TIMEOUT = 10.0
"""Seconds that questions about all objects wait for the index to be read, and close() for the scan to end."""


class Store:
    """The store in `directory`, which is made if its parent exists.

    `limit` and `free_floor` are in bytes: at most so much is stored, and at least so much is left free on
    the disk. `verify`: "start" hashes each block found on the disk before its first use by this process,
    "boot" only after a reboot or when the object was not closed cleanly, "always" is like "start" here (the
    loader asks again per read). `seals`: which objects are sealed (seals.py), if any. `in_memory`: the directory is on
    a tmpfs, says `usage`. Raises StoreError, or ConfigError, in one line that names the directory and the way out.
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
        self._is_spare = is_spare
        """What goes first when there is no room: what is elsewhere, too. From any thread, often: has to be quick."""
        if limit <= 0 or free_floor < 0 or block_size <= 0:
            raise ConfigError(f"cache directory {directory}: cache_size and block_size must be above 0")
        self._lock = threading.Lock()
        self._open_objects: dict[ObjectId, StoredObject] = {}
        self._eviction_count = 0
        self._corrupt_block_count = 0
        self._logged_corrupt_ids: set[ObjectId] = set()
        self._is_closed = False
        self._cache_directory = _prepare_directory(self.directory, block_size)
        try:
            self._ledger = _open_ledger(self._cache_directory)
        except BaseException:
            self._cache_directory.close()
            raise
        self._health = DiskHealth(self.directory)
        self._object_table = ObjectTable()
        self._scanner = Scanner(
            self._cache_directory,
            self._ledger,
            self._health,
            self._object_table,
            self.is_open,
            lambda: self._space.enforce_limits(),
        )
        self._space = Space(
            self.directory,
            self._ledger,
            self._health,
            limit=limit,
            free_floor=free_floor,
            make_room=self._make_room,
            scan_finished=self._scanner.scan_finished,
        )
        self._context = StoreContext(
            cache_directory=self._cache_directory,
            ledger=self._ledger,
            health=self._health,
            space=self._space,
            block_size=block_size,
            boot_id=_read_boot_id(),
            trusts_boot=verify == "boot",
            verified_blocks=VerifiedBlocks(),
            close_object=self._close_object,
            count_corrupt_block=self._count_corrupt_block,
            record_object=self._record_object,
            record_quarantined=self._record_quarantined,
            attestation_policy=attestation_policy,
        )
        self._scanner.start()

    def open(self, version: ObjectVersion) -> StoredObject:
        """Open an object version; while it is open it is never evicted. One StoredObject per version is
        shared by all openers in this process; each closes it once. Files are made when space is first
        reserved."""
        with self._lock:
            if self._is_closed:
                raise StoreError(f"cache directory {self.directory} was closed")
            stored = self._open_objects.get(version.id)
            if stored is None or stored.is_retired:
                stored = self._open_objects[version.id] = StoredObject(version, self._context)
            stored.open_count += 1
            return stored

    def open_in_place(self, version: ObjectVersion) -> contextlib.closing[StoredObject]:
        """See BlockStore."""
        return contextlib.closing(self.open(version))

    @property
    def directories(self) -> Sequence[Path]:
        """See BlockStore."""
        return (self.directory,)

    def present_bytes(self, object_id: ObjectId) -> int:
        """Bytes of an object that are here, by its files; blocking. 0, too, if the disk does not tell."""
        try:
            summary = fs.read_summary(self._cache_directory, object_id)
        except OSError as error:
            self._health.report_failure(error)
            return 0
        return summary.present_bytes if summary is not None else 0

    def is_open(self, object_id: ObjectId) -> bool:
        """Whether this process has it open."""
        return object_id in self._open_objects

    def has_whole(self, version: ObjectVersion) -> bool:
        """Whether all of a version is here and may be given to anybody at once, as far as can be told without opening
        it: it is open, or was when this process closed it, and its files are still there. One look at the disk."""
        with self._lock:
            stored = self._open_objects.get(version.id)
            if stored is not None:
                return stored.is_servable and not stored.is_retired
            known = self._context.verified_blocks.entries.get(version.id)
        if known is None or 0 in known[1] or self._context.attestation_policy is not None:
            return False
        return self._cache_directory.blocks_path(version.id).exists()

    def _close_object(self, stored: StoredObject) -> None:
        object_id = stored.version.id
        with self._lock:
            stored.open_count -= 1
            if stored.open_count > 0:
                return
            if self._open_objects.get(object_id) is stored:
                stored.remember_verified_blocks()
                del self._open_objects[object_id]
        self._record_object(stored)
        stored.close_files()
        if stored.has_written and not stored.is_complete:
            try:
                fs.free_uncommitted_space(self._cache_directory, object_id)
            except OSError as error:
                self._health.report_failure(error)
        self._space.clear_backoff()

    def _record_object(self, stored: StoredObject) -> None:
        summary = stored.summarize_files()
        if summary is not None:
            self._object_table.put_record(stored.version.id, record_from_summary(summary))

    def _record_quarantined(self, stored: StoredObject) -> None:
        summary = fs.read_summary(self._cache_directory, stored.version.id)
        if summary is not None:
            self._object_table.put_record(stored.version.id, record_from_summary(summary))

    def _count_corrupt_block(self, stored: StoredObject, block: int, is_cleared: bool) -> None:
        object_id = stored.version.id
        with self._lock:
            self._corrupt_block_count += 1
            first = object_id not in self._logged_corrupt_ids
            self._logged_corrupt_ids.add(object_id)
        if not is_cleared:
            self._object_table.forget_object(object_id)
        if first:
            _log.warning(
                "%s: block %d in the cache is damaged and is fetched again; check the disk of %s",
                stored.version.key,
                block,
                self.directory,
            )

    # -- eviction

    def _make_room(self, nbytes: int, accept_less: bool) -> int:
        """Evict at least `nbytes`, as the policy says. Returns the bytes freed: 0, and nothing evicted, if
        that can't be reached, but `partly` is content with what there is."""
        self._scanner.index_loaded.wait(_SCAN_TIMEOUT)
        if not self._object_table.can_free(nbytes, self._is_evictable):
            self._scanner.scan_folders()
            if not self._object_table.can_free(nbytes, self._is_evictable) and not accept_less:
                return 0
        freed = 0
        for evictable in (
            (self._is_spare_and_evictable, self._is_evictable)
            if self._is_spare is not None
            else (self._is_evictable,)
        ):
            for object_id in self._object_table.victims(evictable):
                freed += self._evict_object(object_id, is_forced=False)
                if freed >= nbytes:
                    return freed
        return freed

    def _is_spare_and_evictable(self, object_id: ObjectId) -> bool:
        version = self.version_of(object_id)
        return (
            version is not None
            and self._is_spare is not None
            and self._is_spare(version)
            and self._is_evictable(object_id)
        )

    def _is_evictable(self, object_id: ObjectId) -> bool:
        record = self._object_table.get(object_id)
        return record is not None and not record.is_pinned and object_id not in self._open_objects

    def _evict_object(self, object_id: ObjectId, *, is_forced: bool) -> int:
        """Bytes freed; 0: pinned, in use, or (unless `forced`) used since by another process."""
        with self._cache_directory.exclusive_lock() as locked:
            if not locked:
                return 0
            summary = fs.read_summary(self._cache_directory, object_id)
            if summary is not None and (
                summary.state.is_pinned or not (is_forced or self._is_record_current(summary))
            ):
                self._object_table.put_record(object_id, record_from_summary(summary))
                return 0
            if object_id in self._open_objects or not fs.unlink_object_if_unused(
                self._cache_directory, object_id
            ):
                return 0
            stored = summary.stored_bytes if summary is not None else 0
            self._ledger.count_evicted(stored)
        self._object_table.forget_object(object_id, was_evicted=not is_forced)
        self._context.verified_blocks.entries.pop(object_id, None)
        if stored:
            with self._lock:
                self._eviction_count += 1
        return stored

    def _is_record_current(self, summary: fs.BlocksFileSummary) -> bool:
        record = self._object_table.get(summary.version.id)
        return record is None or summary.state.last_use_ns <= record.last_use_ns

    def evict(self, object_id: ObjectId) -> int:
        """Evict one object; returns the bytes freed, 0 if it is not here. Raises StoreError when it is
        pinned or in use by this or any other process."""
        try:
            freed = self._evict_object(object_id, is_forced=True)
            if freed:
                return freed
            summary = fs.read_summary(self._cache_directory, object_id)
        except OSError as error:
            self._health.report_failure(error)
            raise StoreError(f"cache directory {self.directory}: {error.strerror}") from error
        if summary is None:
            return 0
        if summary.state.is_pinned:
            raise StoreError(f"{summary.version.key} is pinned: unpin it first")
        raise StoreError(f"{summary.version.key} is in use: close the programs that read it first")

    def set_pinned(self, object_id: ObjectId, is_pinned: bool) -> None:
        """Keep an object from eviction, in all processes and after restarts, or let it go again. Raises
        StoreError when nothing of it is in the store."""
        try:
            found = fs.write_pinned(self._cache_directory, object_id, is_pinned)
            summary = fs.read_summary(self._cache_directory, object_id)
        except OSError as error:
            self._health.report_failure(error)
            raise StoreError(f"cache directory {self.directory}: {error.strerror}") from error
        if not found or summary is None:
            raise StoreError(f"object {object_id} is not in the cache: read it first")
        self._object_table.put_record(object_id, record_from_summary(summary))
        self._space.clear_backoff()

    # -- what is there

    def usage(self) -> StoreUsage:
        """Figures for `fusecache status`. Just after the start they lack what the index did not tell yet."""
        complete = partial = quarantined = 0
        for info in self._object_infos():
            complete += info.is_complete
            quarantined += info.attestation_state is AttestationState.QUARANTINED
            partial += not info.is_complete and info.attestation_state is not AttestationState.QUARANTINED
        used, limit = self._ledger.used_bytes(), self._space.limit
        return StoreUsage(
            used=used,
            limit=limit,
            objects_complete=complete,
            objects_partial=partial,
            evictions=self._eviction_count,
            corrupt_blocks=self._corrupt_block_count,
            sick=self._health.is_sick,
            objects_quarantined=quarantined,
            memory_used=used if self._is_in_memory else 0,
            memory_limit=limit if self._is_in_memory else 0,
        )

    def objects(self) -> list[ObjectInfo]:
        """Every object version in the store, of all processes, as far as it is known (see scan.py)."""
        self._scanner.index_loaded.wait(_SCAN_TIMEOUT)
        return self._object_infos()

    def version_of(self, object_id: ObjectId) -> ObjectVersion | None:
        """The version with this id, if something of it is in the store."""
        record = self._object_table.get(object_id)
        return None if record is None else record.version

    def wait_for_scan(self, timeout: float) -> bool:
        """Wait until the background scan has seen every object; False after `timeout` seconds."""
        return self._scanner.scan_finished.wait(timeout)

    def _object_infos(self) -> list[ObjectInfo]:
        with self._lock:
            opened = dict(self._open_objects)
        infos = []
        for object_id, record in self._object_table.snapshot():
            stored = opened.get(object_id)
            present = stored.cached_bytes() if stored else record.present_bytes
            infos.append(
                ObjectInfo(
                    object_id,
                    record.version,
                    present,
                    present == record.version.size,
                    record.is_pinned,
                    record.last_use_ns / 1e9,
                    stored.open_count if stored else 0,
                    AttestationState(record.attestation_state)
                    if record.attestation_state in (AttestationState.ATTESTED, AttestationState.QUARANTINED)
                    else AttestationState.NONE,
                    self._is_in_memory,
                )
            )
        return infos

    def close(self) -> None:
        """Flush the index and let the directory go. Objects still open stay readable, but nothing more is
        stored."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            opened = list(self._open_objects.values())
        for stored in opened:
            stored.is_retired = True
        self._scanner.stop(_SCAN_TIMEOUT)
        self._ledger.close()
        self._cache_directory.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _read_boot_id() -> bytes:
    text = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
    return bytes.fromhex(text.strip().replace("-", ""))


def _prepare_directory(directory: Path, block_size: int) -> CacheDirectory:
    """Make the directory's skeleton, or check what is there."""
    if sys.byteorder != "little":
        raise StoreError(f"cache directory {directory}: the store needs a little-endian machine")
    try:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        layout = CacheDirectory(directory)
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
        with layout.exclusive_lock() as locked:
            if not locked:
                raise _stuck_lock_error(directory)
            _check_format(layout, block_size)
            layout.data_root.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        layout.close()
        raise _unusable_error(directory, error) from error
    except BaseException:
        layout.close()
        raise
    return layout


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


def _check_format(cache_directory: CacheDirectory, block_size: int) -> None:
    directory = cache_directory.path
    try:
        found = format.parse_format(cache_directory.format_path.read_bytes())
    except FileNotFoundError:
        temporary = cache_directory.format_path.with_suffix(".tmp")
        temporary.write_bytes(format.pack_format(block_size))
        temporary.rename(cache_directory.format_path)
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


def _open_ledger(cache_directory: CacheDirectory) -> Ledger:
    try:
        with cache_directory.exclusive_lock() as locked:
            if not locked:
                raise _stuck_lock_error(cache_directory.path)
            return Ledger(cache_directory.ledger_path, is_empty=not os.listdir(cache_directory.data_root))
    except OSError as error:
        raise _unusable_error(cache_directory.path, error) from error
