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
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

from fusecache.errors import ConfigError, StoreError
from fusecache.store import files as fs
from fusecache.store import format
from fusecache.store.files import Layout
from fusecache.store.format import Mark
from fusecache.store.health import Health
from fusecache.store.info import ObjectInfo, StoreUsage
from fusecache.store.ledger import Ledger
from fusecache.store.object import StoredObject
from fusecache.store.paths import Paces
from fusecache.store.records import Records, from_summary
from fusecache.store.scan import Scanner
from fusecache.store.seals import Seals
from fusecache.store.shared import Memory, Shared
from fusecache.store.space import Space
from fusecache.types import ObjectId, ObjectVersion

_log = logging.getLogger(__name__)

_WAIT = 10.0
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
        seals: Seals | None = None,
        in_memory: bool = False,
    ) -> None:
        self.directory = Path(directory)
        self.block_size = block_size
        self._in_memory = in_memory
        self.is_spare: Callable[[ObjectId], bool] | None = None
        """What goes first when there is no room: what is elsewhere, too. From any thread, often: has to be quick."""
        self.elsewhere: Callable[[ObjectVersion], float | None] | None = None
        """See BlockStore: nothing that matters here, the object is in this store or in none."""
        if limit <= 0 or free_floor < 0 or block_size <= 0:
            raise ConfigError(f"cache directory {directory}: cache_size and block_size must be above 0")
        self._lock = threading.Lock()
        self._open: dict[ObjectId, StoredObject] = {}
        self._evictions = 0
        self._corrupt_blocks = 0
        self._corrupt_logged: set[ObjectId] = set()
        self._closed = False
        self._layout = _prepare(self.directory, block_size)
        try:
            self._ledger = _open_ledger(self._layout)
        except BaseException:
            self._layout.close()
            raise
        self._health = Health(self.directory)
        self._records = Records()
        self._scanner = Scanner(
            self._layout, self._ledger, self._health, self._records, self.is_open, lambda: self._space.keep()
        )
        self._space = Space(
            self.directory,
            self._ledger,
            self._health,
            limit=limit,
            free_floor=free_floor,
            evict=self._make_room,
            scanned=self._scanner.scanned,
        )
        self._shared = Shared(
            layout=self._layout,
            ledger=self._ledger,
            health=self._health,
            space=self._space,
            block_size=block_size,
            boot_id=_boot_id(),
            trust_boot=verify == "boot",
            memory=Memory(),
            closed=self._close_object,
            corrupt=self._count_corrupt,
            record=self._record,
            quarantined=self._quarantined,
            seals=seals,
        )
        self._scanner.start()

    def open(self, version: ObjectVersion) -> StoredObject:
        """Open an object version; while it is open it is never evicted. One StoredObject per version is
        shared by all openers in this process; each closes it once. Files are made when space is first
        reserved."""
        with self._lock:
            if self._closed:
                raise StoreError(f"cache directory {self.directory} was closed")
            stored = self._open.get(version.id)
            if stored is None or stored.retired:
                stored = self._open[version.id] = StoredObject(version, self._shared)
            stored.open_count += 1
            return stored

    def in_place(self, version: ObjectVersion) -> contextlib.closing[StoredObject]:
        """See BlockStore."""
        return contextlib.closing(self.open(version))

    def paces(self, *, wait: bool = False) -> Paces:
        """See BlockStore: nothing decides anything."""
        return Paces()

    @property
    def directories(self) -> Sequence[Path]:
        """See BlockStore."""
        return (self.directory,)

    @property
    def limit(self) -> int:
        """Most bytes to store."""
        return self._space.limit

    def watch(self, writing: Callable[[int], AbstractContextManager[None]]) -> None:
        """Enter `writing`, with the number of bytes, around each write to a data file from now on."""
        self._shared.writing = writing

    def present_bytes(self, object_id: ObjectId) -> int:
        """Bytes of an object that are here, by its files; blocking. 0, too, if the disk does not tell."""
        try:
            summary = fs.summarize(self._layout, object_id)
        except OSError as error:
            self._health.failed(error)
            return 0
        return summary.present_bytes if summary is not None else 0

    def taken(self, since: float) -> int:
        """Bytes of the objects that are open, whole or not, and of those used since then (in seconds since the
        epoch)."""
        with self._lock:
            opened = {object_id: stored.version.size for object_id, stored in self._open.items()}
        used = [
            record.present_bytes
            for object_id, record in self._records.snapshot()
            if object_id not in opened and record.last_use_ns >= since * 1e9
        ]
        return sum(opened.values()) + sum(used)

    def is_open(self, object_id: ObjectId) -> bool:
        """Whether this process has it open."""
        return object_id in self._open

    def has_whole(self, version: ObjectVersion) -> bool:
        """Whether all of a version is here and may be given to anybody at once, as far as can be told without opening
        it: it is open, or was when this process closed it, and its files are still there. One look at the disk."""
        with self._lock:
            stored = self._open.get(version.id)
            if stored is not None:
                return stored.ready and not stored.retired
            known = self._shared.memory.entries.get(version.id)
        if known is None or 0 in known[1] or self._shared.seals is not None:
            return False
        return self._layout.blocks_path(version.id).exists()

    def _close_object(self, stored: StoredObject) -> None:
        object_id = stored.version.id
        with self._lock:
            stored.open_count -= 1
            if stored.open_count > 0:
                return
            if self._open.get(object_id) is stored:
                stored.remember()
                del self._open[object_id]
        self._record(stored)
        stored.release()
        if stored.wrote and not stored.complete:
            try:
                fs.trim(self._layout, object_id)
            except OSError as error:
                self._health.failed(error)
        self._space.hope()

    def _record(self, stored: StoredObject) -> None:
        summary = stored.summary()
        if summary is not None:
            self._records.put(stored.version.id, from_summary(summary))

    def _quarantined(self, stored: StoredObject) -> None:
        summary = fs.summarize(self._layout, stored.version.id)
        if summary is not None:
            self._records.put(stored.version.id, from_summary(summary))

    def _count_corrupt(self, stored: StoredObject, block: int, in_place: bool) -> None:
        object_id = stored.version.id
        with self._lock:
            self._corrupt_blocks += 1
            first = object_id not in self._corrupt_logged
            self._corrupt_logged.add(object_id)
        if not in_place:
            self._records.drop(object_id)
        if first:
            _log.warning(
                "%s: block %d in the cache is damaged and is fetched again; check the disk of %s",
                stored.version.key,
                block,
                self.directory,
            )

    # -- eviction

    def _make_room(self, nbytes: int, partly: bool) -> int:
        """Evict at least `nbytes`, as the policy says. Returns the bytes freed: 0, and nothing evicted, if
        that can't be reached, but `partly` is content with what there is."""
        self._scanner.loaded.wait(_WAIT)
        if not self._records.can_free(nbytes, self._evictable):
            self._scanner.refresh()
            if not self._records.can_free(nbytes, self._evictable) and not partly:
                return 0
        freed = 0
        for evictable in (self._spare, self._evictable) if self.is_spare is not None else (self._evictable,):
            for object_id in self._records.victims(evictable):
                freed += self._evict_one(object_id, forced=False)
                if freed >= nbytes:
                    return freed
        return freed

    def _spare(self, object_id: ObjectId) -> bool:
        return self.is_spare is not None and self.is_spare(object_id) and self._evictable(object_id)

    def _evictable(self, object_id: ObjectId) -> bool:
        record = self._records.get(object_id)
        return record is not None and not record.pinned and object_id not in self._open

    def _evict_one(self, object_id: ObjectId, *, forced: bool) -> int:
        """Bytes freed; 0: pinned, in use, or (unless `forced`) used since by another process."""
        with self._layout.exclusive() as locked:
            if not locked:
                return 0
            summary = fs.summarize(self._layout, object_id)
            if summary is not None and (summary.state.pinned or not (forced or self._up_to_date(summary))):
                self._records.put(object_id, from_summary(summary))
                return 0
            if object_id in self._open or not fs.discard_unused(self._layout, object_id):
                return 0
            stored = summary.stored_bytes if summary is not None else 0
            self._ledger.evict(stored)
        self._records.drop(object_id, evicted=not forced)
        self._shared.memory.entries.pop(object_id, None)
        if stored:
            with self._lock:
                self._evictions += 1
        return stored

    def _up_to_date(self, summary: fs.Summary) -> bool:
        record = self._records.get(summary.version.id)
        return record is None or summary.state.last_use_ns <= record.last_use_ns

    def evict(self, object_id: ObjectId) -> int:
        """Evict one object; returns the bytes freed, 0 if it is not here. Raises StoreError when it is
        pinned or in use by this or any other process."""
        try:
            freed = self._evict_one(object_id, forced=True)
            if freed:
                return freed
            summary = fs.summarize(self._layout, object_id)
        except OSError as error:
            self._health.failed(error)
            raise StoreError(f"cache directory {self.directory}: {error.strerror}") from error
        if summary is None:
            return 0
        if summary.state.pinned:
            raise StoreError(f"{summary.version.key} is pinned: unpin it first")
        raise StoreError(f"{summary.version.key} is in use: close the programs that read it first")

    def pin(self, object_id: ObjectId, pinned: bool) -> None:
        """Keep an object from eviction, in all processes and after restarts, or let it go again. Raises
        StoreError when nothing of it is in the store."""
        try:
            found = fs.set_pinned(self._layout, object_id, pinned)
            summary = fs.summarize(self._layout, object_id)
        except OSError as error:
            self._health.failed(error)
            raise StoreError(f"cache directory {self.directory}: {error.strerror}") from error
        if not found or summary is None:
            raise StoreError(f"object {object_id} is not in the cache: read it first")
        self._records.put(object_id, from_summary(summary))
        self._space.hope()

    # -- what is there

    def usage(self) -> StoreUsage:
        """Figures for `fusecache status`. Just after the start they lack what the index did not tell yet."""
        complete = partial = quarantined = 0
        for info in self._infos():
            complete += info.complete
            quarantined += info.mark is Mark.QUARANTINED
            partial += not info.complete and info.mark is not Mark.QUARANTINED
        used, limit = self._ledger.used(), self._space.limit
        return StoreUsage(
            used=used,
            limit=limit,
            objects_complete=complete,
            objects_partial=partial,
            evictions=self._evictions,
            corrupt_blocks=self._corrupt_blocks,
            sick=self._health.sick,
            objects_quarantined=quarantined,
            memory_used=used if self._in_memory else 0,
            memory_limit=limit if self._in_memory else 0,
        )

    def objects(self) -> list[ObjectInfo]:
        """Every object version in the store, of all processes, as far as it is known (see scan.py)."""
        self._scanner.loaded.wait(_WAIT)
        return self._infos()

    def version_of(self, object_id: ObjectId) -> ObjectVersion | None:
        """The version with this id, if something of it is in the store."""
        record = self._records.get(object_id)
        return None if record is None else record.version

    def wait_scanned(self, timeout: float) -> bool:
        """Wait until the background scan has seen every object; False after `timeout` seconds."""
        return self._scanner.scanned.wait(timeout)

    def _infos(self) -> list[ObjectInfo]:
        with self._lock:
            opened = dict(self._open)
        infos = []
        for object_id, record in self._records.snapshot():
            stored = opened.get(object_id)
            present = stored.cached_bytes() if stored else record.present_bytes
            infos.append(
                ObjectInfo(
                    object_id,
                    record.version,
                    present,
                    present == record.version.size,
                    record.pinned,
                    record.last_use_ns / 1e9,
                    stored.open_count if stored else 0,
                    Mark(record.mark) if record.mark in (Mark.ATTESTED, Mark.QUARANTINED) else Mark.NONE,
                    self._in_memory,
                )
            )
        return infos

    def close(self) -> None:
        """Flush the index and let the directory go. Objects still open stay readable, but nothing more is
        stored."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            opened = list(self._open.values())
        for stored in opened:
            stored.retired = True
        self._scanner.stop(_WAIT)
        self._ledger.close()
        self._layout.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _boot_id() -> bytes:
    text = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
    return bytes.fromhex(text.strip().replace("-", ""))


def _prepare(directory: Path, block_size: int) -> Layout:
    """Make the directory's skeleton, or check what is there."""
    if sys.byteorder != "little":
        raise StoreError(f"cache directory {directory}: the store needs a little-endian machine")
    try:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        layout = Layout(directory)
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
        raise _unusable(directory, error) from error
    try:
        with layout.exclusive() as locked:
            if not locked:
                raise _stuck(directory)
            _check_format(layout, block_size)
            layout.data.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        layout.close()
        raise _unusable(directory, error) from error
    except BaseException:
        layout.close()
        raise
    return layout


def _unusable(directory: Path, error: OSError) -> StoreError:
    return StoreError(
        f"cache directory {directory} can't be used: {error.strerror}: "
        f"free or permit it, or choose another cache_dir"
    )


def _stuck(directory: Path) -> StoreError:
    return StoreError(
        f"cache directory {directory} is locked by a process that does not go on: "
        f"end it (fuser {directory / 'lock'} names it)"
    )


def _check_format(layout: Layout, block_size: int) -> None:
    directory = layout.directory
    try:
        found = format.parse_format(layout.format.read_bytes())
    except FileNotFoundError:
        temporary = layout.format.with_suffix(".tmp")
        temporary.write_bytes(format.pack_format(block_size))
        temporary.rename(layout.format)
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


def _open_ledger(layout: Layout) -> Ledger:
    try:
        with layout.exclusive() as locked:
            if not locked:
                raise _stuck(layout.directory)
            return Ledger(layout.ledger, empty=not os.listdir(layout.data))
    except OSError as error:
        raise _unusable(layout.directory, error) from error
