"""Looks at sealed objects: hashes them as their blocks land, in order, and compares the whole with its manifest.

Its threads read what landed from the page cache and hash it with the GIL released (1.8 GB/s per thread with SHA-NI,
0.4 without). An object is on one thread at a time (`ObjectFetch.is_being_inspected`), for some blocks, and
then goes to the end of
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

from fusecache.attest.digests import ExpectedDigest, ExpectedDigests, ManifestReplacedError
from fusecache.blocks import block_length
from fusecache.errors import AttestationError, FusecacheError, StoreError, UnavailableError
from fusecache.fetch.object_fetch import HashProgress, ObjectFetch
from fusecache.fetch.service import FetchService
from fusecache.types import ObjectId, ObjectVersion

_log = logging.getLogger(__name__)

_BLOCKS_PER_TURN = 32
"""Blocks per turn of an object."""
_MAX_TRIES = 3
_RETRY_PAUSE = 0.3
"""Seconds until a manifest that was just replaced is asked for again."""


@dataclass
class InspectorStats:
    """Objects since the start; of the inspector's lock."""

    attested: int = 0
    refused: int = 0
    """Opens of what no manifest speaks of."""
    quarantined: int = 0


class ManifestInspector:
    """See loader.Inspector. `start` and `close` own its threads; the lock is a leaf."""

    def __init__(self, digests: ExpectedDigests, threads: int = 2) -> None:
        self.stats = InspectorStats()
        self._digests = digests
        self._loader: FetchService | None = None
        self._queue: queue.SimpleQueue[ObjectFetch | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._logged_versions: set[ObjectId] = set()
        """Versions that the log has a line about."""
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._inspect_queued, name=f"inspector-{number}", daemon=True)
            for number in range(threads)
        ]

    def start(self, loader: FetchService) -> None:
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

    def forget_answers(self) -> None:
        """The sources were listed anew: ask the origin again, and say again what is wrong."""
        self._digests.forget_metadata()
        with self._lock:
            self._logged_versions.clear()

    # -- who opens a file

    def open_attestable(self, version: ObjectVersion, source: str) -> ObjectFetch:
        """The load of this version, opened once more, if it can be attested: somebody says what it has to be, and it is
        not in quarantine for being something else. May wait for the origin. Raises AttestationError, and what reading a
        manifest raises."""
        fetch_service = self._loader
        assert fetch_service is not None
        object_fetch = fetch_service.open_object(version, source)
        try:
            stored = object_fetch.stored
            if stored.is_unattested:
                expected = self._find_expected(version, source)
                found = (
                    hashlib.sha256(b"").digest()
                    if version.size == 0
                    else stored.attestation.quarantine_sha256
                )
                if found is not None and found != expected.sha256:
                    raise AttestationError(_mismatch_text(version, expected, found))
                if stored.attestation.quarantine_sha256 is not None:
                    _log.info(
                        "%s: %s says what was found: it is fetched again", version.key, expected.stated_by
                    )
                    fetch_service.attestation_gate.lift_quarantine(object_fetch)
                if version.size == 0:
                    stored.attestation.mark_attested(expected.sha256)
        except AttestationError as error:
            self._log_error_once(version, error)
            with self._lock:
                self.stats.refused += 1
            fetch_service.release_fetch(object_fetch)
            raise
        except BaseException:
            fetch_service.release_fetch(object_fetch)
            raise
        return object_fetch

    def _find_expected(self, version: ObjectVersion, source: str) -> ExpectedDigest:
        """See ExpectedDigests.find_expected; a manifest that was just replaced is read again."""
        for attempt in range(_MAX_TRIES):
            try:
                return self._digests.find_expected(version, source)
            except ManifestReplacedError:
                if attempt == _MAX_TRIES - 1 or self._stopping.wait(_RETRY_PAUSE):
                    raise
        raise AssertionError("unreachable")

    def _log_error_once(self, version: ObjectVersion, error: AttestationError) -> None:
        with self._lock:
            if version.id in self._logged_versions:
                return
            self._logged_versions.add(version.id)
        _log.error("%s", error)

    # -- what landed

    def request_inspection(self, object_fetch: ObjectFetch) -> None:
        """See loader.Inspector."""
        self._queue.put(object_fetch)

    def _inspect_queued(self) -> None:
        buffer = bytearray()
        while (object_fetch := self._queue.get()) is not None and not self._stopping.is_set():
            error: FusecacheError | None = None
            done = True
            try:
                if len(buffer) < object_fetch.stored.block_size:
                    buffer = bytearray(object_fetch.stored.block_size)
                done = self._hash_blocks(object_fetch, memoryview(buffer)) and self._compare_with_manifest(
                    object_fetch
                )
            except FusecacheError as failure:
                error = failure
            except Exception as failure:
                _log.exception("an inspection failed in an unforeseen way")
                error = UnavailableError(f"{object_fetch.version.key}: {type(failure).__name__}: see the log")
            if self._loader is not None:
                self._loader.attestation_gate.inspection_ended(object_fetch, done, error)

    def _hash_blocks(self, object_fetch: ObjectFetch, buffer: memoryview) -> bool:
        """Hash some of what is there; whether that was the last of it."""
        stored, fold = object_fetch.stored, object_fetch.hash_progress
        if fold.discards != stored.blocks.bad_block_count:
            fold = object_fetch.hash_progress = HashProgress(stored.blocks.bad_block_count)
        stop = min(fold.hashed_blocks + _BLOCKS_PER_TURN, stored.block_count)
        while fold.hashed_blocks < stop and stored.is_present(fold.hashed_blocks):
            with buffer[
                : block_length(fold.hashed_blocks, object_fetch.version.size, stored.block_size)
            ] as view:
                if not _read_fully(stored.fileno(), view, fold.hashed_blocks * stored.block_size):
                    assert self._loader is not None
                    self._loader.recheck_block(object_fetch, fold.hashed_blocks)
                    return False
                fold.sha256.update(view)
            fold.hashed_blocks += 1
        return (
            fold.hashed_blocks == stored.block_count
            and fold.discards == stored.blocks.bad_block_count
            and stored.is_complete
        )

    def _compare_with_manifest(self, object_fetch: ObjectFetch) -> bool:
        """Break the seal or raise AttestationError; False: a block was found bad in between."""
        stored, version = object_fetch.stored, object_fetch.version
        found = object_fetch.hash_progress.sha256.digest()
        try:
            expected = self._find_expected(version, object_fetch.source)
        except AttestationError as error:
            self._log_error_once(version, error)
            raise
        if found != expected.sha256:
            stored.attestation.enter_quarantine(found)
            with self._lock:
                self.stats.quarantined += 1
            mismatch = AttestationError(_mismatch_text(version, expected, found))
            self._log_error_once(version, mismatch)
            raise mismatch
        if stored.attestation.quarantine_sha256 is not None:  # another process put it there meanwhile
            stored.attestation.lift_quarantine()
        stored.attestation.mark_attested(found)
        if stored.is_unattested:
            return False
        with self._lock:
            self.stats.attested += 1
        _log.info("%s is what %s says: sha256 %s", version.key, expected.stated_by, found.hex())
        return True


def _read_fully(fd: int, view: memoryview, offset: int) -> bool:
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


def _mismatch_text(version: ObjectVersion, expected: ExpectedDigest, found: bytes) -> str:
    return (
        f"{version.key} is not what {expected.stated_by} says: its sha256 is {found.hex()}, "
        f"expected {expected.sha256.hex()}; "
        "it is in quarantine: upload it again, or mend the manifest"
    )
