"""The store's one thread: it reads the index, walks over the files behind the running store, and keeps the
index.

The walk adopts objects that the index does not know, forgets those without files, removes what a crash left
behind and recounts the ledger. Later rounds look only into directories whose mtime changed, which is how
objects that other processes made or evicted become known. Data files are not opened.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
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


class Scanner:
    """Runs in a thread from `start` to `stop`. `busy(id)` says whether this process has an object open.

    `loaded` is set when the index was read, `counted` when the ledger can be relied on, `scanned` after the
    walk.
    """

    def __init__(
        self,
        layout: Layout,
        ledger: Ledger,
        health: Health,
        records: Records,
        busy: Callable[[ObjectId], bool],
        counted: threading.Event,
    ) -> None:
        self.loaded = threading.Event()
        self.counted = counted
        self.scanned = threading.Event()
        self._layout = layout
        self._ledger = ledger
        self._health = health
        self._records = records
        self._busy = busy
        self._mtimes: dict[str, int] = {}
        self._refreshing = threading.Lock()
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fusecache-store", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Flush the index and end; waits at most `timeout` seconds."""
        self._stop.set()
        self._wake.set()
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
                self.counted.set()
                self.scanned.set()
            while True:
                self._flush(index)
                if self._stop.is_set():
                    return
                self._wake.wait(FLUSH_INTERVAL)
                if not self._stop.is_set():
                    self._wake.clear()
                    self.refresh()
        except Exception:
            _log.exception("cache directory %s: the background scan ended", self._layout.directory)
        finally:
            self.loaded.set()
            index.close()

    def _flush(self, index: Index) -> None:
        changed, dropped = self._records.take_dirty()
        if changed or dropped:
            placed = []
            for object_id, record in changed:
                uses, main = self._records.place(object_id)
                placed.append((object_id, replace(record, accesses=uses, main=main)))
            index.save(placed, dropped)
            index.save_order(*self._records.order())

    def _recount(self) -> None:
        before = self._ledger.start_recount()
        counted: int | None = None
        try:
            counted = self.refresh(everything=True)
        finally:
            if before is not None:
                change = self._ledger.finish_recount(before, counted)
                if change:
                    _log.info(
                        "cache directory %s: recounted, off by %d bytes", self._layout.directory, change
                    )

    def refresh(self, *, everything: bool = False) -> int | None:
        """Look at the directories that changed, or at all of them; returns the bytes stored in those looked
        at, None if it was cut short."""
        total = 0
        with self._refreshing:
            seen: set[str] = set()
            try:
                with os.scandir(self._layout.data) as entries:
                    folders = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
                for entry in folders:
                    seen.add(entry.name)
                    mtime = os.stat(entry.path).st_mtime_ns
                    if everything or self._mtimes.get(entry.name) != mtime:
                        part = self._folder(entry.name)
                        if part is None:
                            return None
                        self._mtimes[entry.name] = mtime
                        total += part
            except OSError as error:
                self._health.failed(error)
                return None
            for object_id, _ in self._records.snapshot():
                if object_id[:2] not in seen and not self._busy(object_id):
                    self._records.drop(object_id)
        return total

    def _folder(self, name: str) -> int | None:
        names = set(os.listdir(self._layout.data / name))
        ids = {x.partition(".")[0] for x in names}
        total = 0
        for text in sorted(ids):
            if self._stop.is_set():
                return None
            object_id = ObjectId(text)
            summary = None
            if f"{text}.data" in names and f"{text}.blocks" in names and f"{text}.new" not in names:
                summary = fs.summarize(self._layout, text)
            if summary is None:
                self._clean(text)
                summary = fs.summarize(self._layout, text)
            if summary is not None:
                total += summary.stored_bytes
                if not self._busy(object_id):
                    record = self._records.get(object_id)
                    self._records.put(
                        object_id, from_summary(summary, main=record is not None and record.main)
                    )
        for object_id, _ in self._records.snapshot():
            if object_id[:2] == name and object_id not in ids and not self._busy(object_id):
                self._records.drop(object_id)
        return total

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
