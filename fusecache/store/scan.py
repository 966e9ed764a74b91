"""The store's one thread: it reads the index, walks over the files behind the running store, and keeps the
index.

The walk adopts objects that the index does not know, forgets those without files, removes what a crash left
behind, gives back what was written but never marked, and recounts the ledger. Later rounds look only into
directories whose mtime changed, which is how objects that other processes made or evicted become known, and there
at what is not known to be complete: eviction looks again before it unlinks. Data files are not opened, but those
with bytes to give back.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from fusecache.store import files as fs
from fusecache.store.files import Layout
from fusecache.store.health import Health
from fusecache.store.index import Index
from fusecache.store.ledger import Ledger
from fusecache.store.records import Records, from_summary
from fusecache.types import ObjectId

_log = logging.getLogger(__name__)

FLUSH_INTERVAL = 5.0
"""Seconds between two flushes of the index and looks at the directories."""

_ORDER_INTERVAL = 60.0
"""Seconds between two saves of the whole order of eviction, which only a crash loses."""
_OBJECT_ID = re.compile(r"[0-9a-f]{32}")


class Scanner:
    """Runs in a thread from `start` to `stop`. `busy(id)` says whether this process has an object open,
    `keep()` evicts what is over the bounds.

    `loaded` is set when the index was read, `scanned` after the
    walk.
    """

    def __init__(
        self,
        layout: Layout,
        ledger: Ledger,
        health: Health,
        records: Records,
        busy: Callable[[ObjectId], bool],
        keep: Callable[[], None],
    ) -> None:
        self.loaded = threading.Event()
        self.scanned = threading.Event()
        self._layout = layout
        self._ledger = ledger
        self._health = health
        self._records = records
        self._busy = busy
        self._keep = keep
        self._mtimes: dict[str, int] = {}
        self._refreshing = threading.Lock()
        self._stop = threading.Event()
        self._order_dirty = False
        self._order_saved = 0.0
        self._thread = threading.Thread(target=self._run, name="fusecache-store", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Flush the index and end; waits at most `timeout` seconds."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        index = Index(self._layout.index)
        try:
            self._records.load(*index.load())
            self.loaded.set()
            try:
                self._recount()
            finally:
                self.scanned.set()
            self._keep()
            while not self._stop.wait(FLUSH_INTERVAL):
                self._flush(index)
                # what a process that died was writing is found by a walk over everything only
                if self._ledger.counted and not self._somebody_died():
                    self.refresh()
                else:
                    self._recount()
                self._keep()
            self._flush(index, order=True)
        except Exception:
            _log.exception("cache directory %s: the background scan ended", self._layout.directory)
        finally:
            self.loaded.set()
            index.close()

    def _somebody_died(self) -> bool:
        try:
            return self._ledger.drop_dead()
        except OSError as error:
            self._health.failed(error)
            return False

    def _flush(self, index: Index, *, order: bool = False) -> None:
        changed, dropped = self._records.take_dirty()
        if changed or dropped:
            placed = []
            for object_id, record in changed:
                uses, main = self._records.place(object_id)
                placed.append((object_id, replace(record, accesses=uses, main=main)))
            index.save(placed, dropped)
            self._order_dirty = True
        now = time.monotonic()
        if self._order_dirty and (order or now >= self._order_saved + _ORDER_INTERVAL):
            index.save_order(*self._records.order())
            self._order_dirty, self._order_saved = False, now

    def _recount(self) -> None:
        try:
            with self._layout.exclusive() as locked:
                before = self._ledger.start_recount() if locked else None
            counted: int | None = None
            try:
                counted = self.refresh(everything=True)
            finally:
                if before is not None:
                    with self._layout.exclusive() as locked:
                        change = self._ledger.finish_recount(before, counted if locked else None)
                    if change:
                        _log.info(
                            "cache directory %s: recounted, off by %d bytes", self._layout.directory, change
                        )
        except OSError as error:
            self._health.failed(error)

    def refresh(self, *, everything: bool = False) -> int | None:
        """Look at what is new in the directories that changed, or at everything; returns the bytes stored in what was
        looked at, None if it was cut short."""
        total = 0
        with self._refreshing:
            seen: set[str] = set()
            known: dict[str, set[ObjectId]] = {}
            for object_id, _ in self._records.snapshot():
                known.setdefault(object_id[:2], set()).add(object_id)
            try:
                with os.scandir(self._layout.data) as entries:
                    folders = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
                for entry in folders:
                    seen.add(entry.name)
                    mtime = os.stat(entry.path).st_mtime_ns
                    if everything or self._mtimes.get(entry.name) != mtime:
                        part = self._folder(entry.name, known.get(entry.name, set()), trim=everything)
                        if part is None:
                            return None
                        self._mtimes[entry.name] = mtime
                        total += part
            except OSError as error:
                self._health.failed(error)
                return None
            for name in known.keys() - seen:
                self._drop(known[name])
        return total

    def _folder(self, name: str, known: set[ObjectId], *, trim: bool) -> int | None:
        names = set(os.listdir(self._layout.data / name))
        ids = {x.partition(".")[0] for x in names}
        total = 0
        for text in sorted(ids):
            if self._stop.is_set():
                return None
            if _OBJECT_ID.fullmatch(text):
                whole = f"{text}.data" in names and f"{text}.blocks" in names and f"{text}.new" not in names
                record = None if trim or not whole else self._records.get(ObjectId(text))
                if record is not None and record.complete:
                    continue
                total += self._look(ObjectId(text), whole, trim)
        self._drop(known - ids)
        return total

    def _look(self, object_id: ObjectId, whole: bool, trim: bool) -> int:
        """Take over what the files say; returns the bytes stored."""
        self._records.watch(object_id)
        try:
            summary = fs.summarize(self._layout, object_id) if whole else None
            if summary is None:
                self._clean(object_id)
                summary = fs.summarize(self._layout, object_id)
            if trim and summary is not None and fs.may_trim(self._layout, summary):
                fs.trim(self._layout, object_id)
        except FileNotFoundError:
            return 0  # evicted meanwhile
        except OSError as error:
            self._health.failed(error)
            return 0
        if summary is None:
            self._drop((object_id,))
            return 0
        if not self._busy(object_id):
            self._records.put_watched(object_id, from_summary(summary))
        return summary.stored_bytes

    def _drop(self, gone: Iterable[ObjectId]) -> None:
        for object_id in gone:
            if not self._busy(object_id):
                self._records.drop(object_id)

    def _clean(self, object_id: str) -> None:
        """Remove what a crash left: half a pair, or a file that is broken. Creation holds the same lock."""
        with self._layout.exclusive() as locked:
            if not locked:
                return
            self._layout.blocks_path(object_id).with_suffix(".new").unlink(missing_ok=True)
            if (
                fs.summarize(self._layout, object_id) is None
                or not self._layout.data_path(object_id).exists()
            ):
                fs.discard_unused(self._layout, object_id)
