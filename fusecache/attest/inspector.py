"""Looks at sealed objects: hashes them as their blocks land, in order, and compares the whole with its manifest.

Its threads read what landed from the page cache and hash it with the GIL released (1.8 GB/s per thread with SHA-NI,
0.4 without). An object is on one thread at a time (`ObjectLoad.looking`), for some blocks, and then goes to the end of
the queue, so that a large one does not hold up the others.

An object that is what its manifest says is attested, once per version and node: the store keeps that. One that is not
goes into quarantine: its bytes are dropped, nobody is given any of them, and it is not fetched again before its
manifest changes to what was found, it is evicted, or there is another version of it. One that nobody speaks of stays as
it is, for the next one who opens it to ask again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
import time
from dataclasses import dataclass

from fusecache.attest.digests import Digests, Expected, ManifestReplacedError
from fusecache.blocks import block_bytes
from fusecache.errors import AttestationError, FusecacheError, StoreError, UnavailableError
from fusecache.loader.load import Fold, ObjectLoad
from fusecache.loader.loader import Loader
from fusecache.types import ObjectId, ObjectVersion

_log = logging.getLogger(__name__)

_RUN = 32
"""Blocks per turn of an object."""
_TRIES = 3
_PAUSE = 0.3
"""Seconds until a manifest that was just replaced is asked for again."""


@dataclass
class InspectorStats:
    """Objects since the start; of the inspector's lock."""

    attested: int = 0
    refused: int = 0
    """Opens of what no manifest speaks of."""
    quarantined: int = 0


class Inspector:
    """See loader.Inspector. `start` and `close` own its threads; the lock is a leaf."""

    def __init__(self, digests: Digests, threads: int = 2) -> None:
        self.stats = InspectorStats()
        self._digests = digests
        self._loader: Loader | None = None
        self._queue: queue.SimpleQueue[ObjectLoad | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._told: set[ObjectId] = set()
        """Versions that the log has a line about."""
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"inspector-{number}", daemon=True)
            for number in range(threads)
        ]

    def start(self, loader: Loader) -> None:
        """Begin to look at the objects of this loader."""
        self._loader = loader
        for thread in self._threads:
            thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """End; waits `timeout` seconds at most."""
        self._stopping.set()
        for _ in self._threads:
            self._queue.put(None)
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))

    def forget(self) -> None:
        """The sources were listed anew: ask the origin again, and say again what is wrong."""
        self._digests.forget()
        with self._lock:
            self._told.clear()

    # -- who opens a file

    def admit(self, version: ObjectVersion, source: str) -> ObjectLoad:
        """The load of this version, opened once more, if it can be attested: somebody says what it has to be, and it is
        not in quarantine for being something else. May wait for the origin. Raises AttestationError, and what reading a
        manifest raises."""
        loader = self._loader
        assert loader is not None
        load = loader.open(version, source)
        try:
            stored = load.stored
            if stored.sealed:
                expected = self._expected(version, source)
                found = hashlib.sha256(b"").digest() if version.size == 0 else stored.quarantined
                if found is not None and found != expected.sha256:
                    raise AttestationError(_mismatch(version, expected, found))
                if stored.quarantined is not None:
                    _log.info("%s: %s says what was found: it is fetched again", version.key, expected.by)
                    loader.gate.lift(load)
                if version.size == 0:
                    stored.attest(expected.sha256)
        except AttestationError as error:
            self._tell(version, error)
            with self._lock:
                self.stats.refused += 1
            loader.release(load)
            raise
        except BaseException:
            loader.release(load)
            raise
        return load

    def _expected(self, version: ObjectVersion, source: str) -> Expected:
        """See Digests.expected; a manifest that was just replaced is read again."""
        for attempt in range(_TRIES):
            try:
                return self._digests.expected(version, source)
            except ManifestReplacedError:
                if attempt == _TRIES - 1 or self._stopping.wait(_PAUSE):
                    raise
        raise AssertionError("unreachable")

    def _tell(self, version: ObjectVersion, error: AttestationError) -> None:
        with self._lock:
            if version.id in self._told:
                return
            self._told.add(version.id)
        _log.error("%s", error)

    # -- what landed

    def look(self, load: ObjectLoad) -> None:
        """See loader.Inspector."""
        self._queue.put(load)

    def _work(self) -> None:
        buffer = bytearray()
        while (load := self._queue.get()) is not None and not self._stopping.is_set():
            error: FusecacheError | None = None
            done = True
            try:
                if len(buffer) < load.stored.block_size:
                    buffer = bytearray(load.stored.block_size)
                done = self._fold(load, memoryview(buffer)) and self._judge(load)
            except FusecacheError as failure:
                error = failure
            except Exception as failure:
                _log.exception("an inspection failed in an unforeseen way")
                error = UnavailableError(f"{load.version.key}: {type(failure).__name__}: see the log")
            if self._loader is not None:
                self._loader.gate.looked(load, done, error)

    def _fold(self, load: ObjectLoad, buffer: memoryview) -> bool:
        """Hash some of what is there; whether that was the last of it."""
        stored, fold = load.stored, load.fold
        if fold.discards != stored.discards:
            fold = load.fold = Fold(stored.discards)
        stop = min(fold.position + _RUN, stored.block_count)
        while fold.position < stop and stored.present(fold.position):
            with buffer[: block_bytes(fold.position, load.version.size, stored.block_size)] as view:
                if not _read(stored.fileno(), view, fold.position * stored.block_size):
                    assert self._loader is not None
                    self._loader.suspect(load, fold.position)
                    return False
                fold.sha256.update(view)
            fold.position += 1
        return fold.position == stored.block_count and fold.discards == stored.discards and stored.complete

    def _judge(self, load: ObjectLoad) -> bool:
        """Break the seal or raise AttestationError; False: a block was found bad in between."""
        stored, version = load.stored, load.version
        found = load.fold.sha256.digest()
        try:
            expected = self._expected(version, load.source)
        except AttestationError as error:
            self._tell(version, error)
            raise
        if found != expected.sha256:
            stored.quarantine(found)
            with self._lock:
                self.stats.quarantined += 1
            mismatch = AttestationError(_mismatch(version, expected, found))
            self._tell(version, mismatch)
            raise mismatch
        if stored.quarantined is not None:  # another process put it there meanwhile
            stored.lift()
        stored.attest(found)
        if stored.sealed:
            return False
        with self._lock:
            self.stats.attested += 1
        _log.info("%s is what %s says: sha256 %s", version.key, expected.by, found.hex())
        return True


def _read(fd: int, view: memoryview, offset: int) -> bool:
    done = 0
    try:
        while done < len(view):
            got = os.preadv(fd, [view[done:]], offset + done)
            if got == 0:
                return False
            done += got
    except (OSError, StoreError):
        return False
    return True


def _mismatch(version: ObjectVersion, expected: Expected, found: bytes) -> str:
    return (
        f"{version.key} is not what {expected.by} says: its sha256 is {found.hex()}, expected {expected.sha256.hex()}; "
        "it is in quarantine: upload it again, or mend the manifest"
    )
