"""Sealed objects in a loader with the real store: who gets their bytes, when, and what becomes of wrong ones."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusecache.attest.digests import UNSIGNED, ExpectedDigests
from fusecache.attest.inspector import ManifestInspector
from fusecache.attest.manifests import is_manifest
from fusecache.errors import AttestationError, StoreError, UnavailableError, VersionChangedError
from fusecache.fetch.attestation_queue import AttestationQueue
from fusecache.fetch.block_source import OriginBlockSource
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.service import FetchService
from fusecache.fetch.settings import FetchSettings
from fusecache.fetch.waiter import Waiter
from fusecache.prefetch.interface import PrefetchSettings
from fusecache.prefetch.prefetcher import Prefetcher
from fusecache.store.attestation import AttestationPolicy
from fusecache.store.disk.format import AttestationState
from fusecache.store.store import Store
from fusecache.types import ObjectVersion
from tests.support.content import check, content
from tests.support.scripted import WAIT, ScriptedOrigin, Step, version
from tests.support.servers import wait_until
from tests.unit.test_fetch_service import BLOCK, RecordingCatalog, fetching

FILE = version("a.bin", 9 * BLOCK + 5)


def sha256(found: ObjectVersion) -> bytes:
    return hashlib.sha256(content(found.key, found.etag, 0, found.size)).digest()


class Bench:
    """One node's life: everything from the origin to the inspector."""

    def __init__(self, directory: Path, origin: ScriptedOrigin, limit: int, settings: FetchSettings) -> None:
        self.origin = origin
        self.store = Store(
            directory,
            limit=limit,
            free_floor=0,
            block_size=BLOCK,
            attestation_policy=AttestationPolicy(UNSIGNED, is_manifest),
        )
        self.library = RecordingCatalog(list(origin.versions.values()))
        self.asked: list[str] = []
        queue = AttestationQueue()
        self.loader = FetchService(
            self.store,
            OriginBlockSource({"": origin}),
            settings,
            events=self.library.events,
            attestation_queue=queue,
        )
        Prefetcher(self.loader, self.library, PrefetchSettings(is_enabled=settings.prefetch))
        digests = ExpectedDigests(lambda _about, _key: None, self._read, self._ask)
        self.inspector = ManifestInspector(digests, self.loader, queue)
        self.loader.start()
        self.inspector.start()

    def _read(self, found: ObjectVersion, source: str) -> bytes:
        raise AssertionError("there are no manifests here")

    def _ask(self, found: ObjectVersion, source: str) -> bytes | None:
        self.asked.append(found.key)
        return self.origin.read_metadata_sha256(found)

    def open(self, found: ObjectVersion = FILE) -> ObjectFetch:
        """Open a file as a mount does."""
        object_fetch = self.inspector.open_attestable(found, "")
        done = threading.Event()
        try:
            waiter = self.loader.await_attestation(object_fetch, lambda _waiter: done.set())
            if waiter is not None:
                assert done.wait(WAIT), "the open was never answered"
                if waiter.error is not None:
                    raise waiter.error
        except BaseException:
            self.loader.release_fetch(object_fetch)
            raise
        return object_fetch

    def mark(self, found: ObjectVersion = FILE) -> AttestationState:
        return {info.id: info.attestation_state for info in self.store.objects()}.get(
            found.id, AttestationState.NONE
        )

    def close(self) -> None:
        self.inspector.close()
        self.loader.close()
        self.store.close()


Make = Callable[..., Bench]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    benches: list[Bench] = []

    def build(origin: ScriptedOrigin | None = None, limit: int = 1 << 30, **settings: object) -> Bench:
        if origin is None:
            origin = ScriptedOrigin([FILE], chunk=BLOCK // 2)
            origin.digests[FILE.id] = sha256(FILE)
        values = {"concurrency": 4, "range_bytes": 2 * BLOCK, "deadline": 30.0, **settings}
        bench = Bench(tmp_path / "cache", origin, limit, FetchSettings(**values))  # type: ignore[arg-type]
        benches.append(bench)
        return bench

    yield build
    for bench in benches:
        bench.close()


class Result:
    """A request that is not waited for yet."""

    def __init__(self, bench: Bench, object_fetch: ObjectFetch, offset: int, *, whole: bool = True) -> None:
        self.settled = threading.Event()
        self.waiter = bench.loader.request_bytes(object_fetch, offset, 10, self._settled, by_reader=whole)

    def _settled(self, _waiter: Waiter) -> None:
        self.settled.set()

    def wait(self) -> None:
        if self.waiter is not None:
            assert self.settled.wait(WAIT), "it was never answered"
            if self.waiter.error is not None:
                raise self.waiter.error


def test_no_byte_is_given_before_all_were_vouched_for(make: Make) -> None:
    bench = make()
    step = Step()
    bench.origin.gate = step.hold_from(8 * BLOCK)
    object_fetch = bench.loader.open_object(FILE, "")
    first = Result(bench, object_fetch, 0)
    wait_until(lambda: all(object_fetch.stored.is_present(block) for block in range(8)), "eight blocks", WAIT)
    assert not first.settled.is_set()
    assert not object_fetch.stored.is_range_servable(0, 10)
    peer = Result(bench, object_fetch, 0, whole=False)  # another node looks for itself
    assert peer.waiter is None
    step.open()
    first.wait()
    assert object_fetch.stored.is_servable
    check(bench.loader.read_bytes(object_fetch, 0, FILE.size), "a.bin", "1")
    bench.library.wait("a.bin")
    assert bench.mark() is AttestationState.ATTESTED
    assert sum(length for _, _, length in bench.origin.reads) == FILE.size
    bench.loader.release_fetch(object_fetch)


@pytest.mark.parametrize("prefetch", [True, False])
def test_an_open_brings_the_whole_file(make: Make, prefetch: bool) -> None:
    bench = make(prefetch=prefetch)
    object_fetch = bench.open()
    assert object_fetch.stored.is_servable
    assert bench.inspector.stats.attested == 1
    bench.loader.release_fetch(object_fetch)


def test_wrong_bytes_are_given_to_nobody_and_not_fetched_again(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make()
    bench.origin.digests[FILE.id] = bytes(32)
    object_fetch = bench.loader.open_object(FILE, "")
    reader = Result(bench, object_fetch, 0)
    with pytest.raises(
        AttestationError, match=f"a.bin is not what the origin's metadata says.*{sha256(FILE).hex()}"
    ):
        bench.open()
    with pytest.raises(AttestationError):
        reader.wait()
    with pytest.raises(AttestationError):
        bench.loader.request_bytes(object_fetch, 0, 1, lambda _waiter: None)
    bench.loader.release_fetch(object_fetch)
    assert bench.mark() is AttestationState.QUARANTINED
    assert bench.store.usage().used <= 2 * 4096
    assert bench.library.complete["a.bin"].is_set() is False
    reads = len(bench.origin.reads)
    for _ in range(3):
        with pytest.raises(AttestationError, match="is not what the origin's metadata says"):
            bench.open()
    again = bench.loader.open_object(FILE, "")
    with pytest.raises(AttestationError, match="quarantine"):
        bench.loader.request_bytes(again, 0, 1, lambda _waiter: None, by_reader=False)
    bench.loader.fetch_whole_file(again)
    bench.loader.dispatcher.plan_files([(FILE, "")])
    bench.loader.release_fetch(again)
    assert len(bench.origin.reads) == reads
    lines = [record.message for record in caplog.records if "is not what" in record.message]
    assert len(lines) == 1


def test_a_quarantine_outlives_a_restart_and_ends_by_eviction(make: Make) -> None:
    first = make()
    first.origin.digests[FILE.id] = bytes(32)
    with pytest.raises(AttestationError):
        first.open()
    first.close()
    bench = make(first.origin)
    reads = len(bench.origin.reads)
    with pytest.raises(AttestationError):
        bench.open()
    assert len(bench.origin.reads) == reads
    wait_until(lambda: bench.store.evict(FILE.id) > 0, "an eviction", WAIT)
    with pytest.raises(AttestationError):
        bench.open()
    assert len(bench.origin.reads) > reads  # it was looked at once more


def test_a_manifest_that_says_what_was_found_ends_a_quarantine(make: Make) -> None:
    bench = make()
    bench.origin.digests[FILE.id] = bytes(32)
    with pytest.raises(AttestationError):
        bench.open()
    bench.origin.digests[FILE.id] = sha256(FILE)
    with pytest.raises(AttestationError):
        bench.open()  # metadata is asked for once
    bench.inspector.forget_answers()
    object_fetch = bench.open()
    check(bench.loader.read_bytes(object_fetch, 0, FILE.size), "a.bin", "1")
    assert bench.mark() is AttestationState.ATTESTED
    bench.loader.release_fetch(object_fetch)


def test_another_version_is_another_object(make: Make) -> None:
    bench = make()
    bench.origin.digests[FILE.id] = bytes(32)
    with pytest.raises(AttestationError):
        bench.open()
    new = version("a.bin", 5 * BLOCK, "2")
    bench.origin.digests[new.id] = sha256(new)
    object_fetch = bench.open(new)
    check(bench.loader.read_bytes(object_fetch, 0, new.size), "a.bin", "2")
    bench.loader.release_fetch(object_fetch)


def test_what_nobody_speaks_of_is_not_fetched_at_all(make: Make) -> None:
    bench = make(ScriptedOrigin([FILE]))
    for _ in range(2):
        with pytest.raises(AttestationError, match="in no manifest"):
            bench.open()
    assert bench.origin.reads == []
    assert bench.asked == ["a.bin"]
    assert bench.inspector.stats.refused == 2


def test_after_a_restart_nobody_is_asked_again(make: Make) -> None:
    first = make()
    first.loader.release_fetch(first.open())
    first.close()
    bench = make(first.origin)
    reads = len(bench.origin.reads)
    object_fetch = bench.open()
    check(bench.loader.read_bytes(object_fetch, 0, FILE.size), "a.bin", "1")
    assert bench.asked == []
    assert bench.inspector.stats.attested == 0
    assert len(bench.origin.reads) == reads
    bench.loader.release_fetch(object_fetch)


def test_bytes_from_before_manifests_were_asked_for_are_looked_at_without_a_fetch(
    make: Make, tmp_path: Path
) -> None:
    origin = ScriptedOrigin([FILE])
    origin.digests[FILE.id] = sha256(FILE)
    with Store(tmp_path / "cache", limit=1 << 30, free_floor=0, block_size=BLOCK) as store:
        catalog_view = RecordingCatalog([FILE])
        with fetching(store, origin, catalog_view, FetchSettings(concurrency=2)) as fetch_service:
            object_fetch = fetch_service.open_object(FILE, "")
            fetch_service.fetch_whole_file(object_fetch)
            catalog_view.wait("a.bin")
            fetch_service.release_fetch(object_fetch)
    reads = len(origin.reads)
    bench = make(origin)
    object_fetch = bench.open()
    assert bench.inspector.stats.attested == 1
    assert len(origin.reads) == reads
    bench.loader.release_fetch(object_fetch)


def test_a_block_that_went_bad_seals_the_file_until_all_was_looked_at_again(
    make: Make, tmp_path: Path
) -> None:
    bench = make()
    object_fetch = bench.open()
    (data,) = (tmp_path / "cache").rglob("*.data")
    with data.open("r+b") as raw:
        raw.seek(3 * BLOCK)
        raw.write(b"damaged!")
    bench.loader.recheck_block(object_fetch, 3)
    assert object_fetch.stored.is_unattested
    step = Step()
    bench.origin.gate = step.hold_from(0)
    reader = Result(bench, object_fetch, 0)
    assert step.arrived()
    assert not reader.settled.is_set()
    step.open()
    reader.wait()
    assert object_fetch.stored.is_servable
    assert bench.inspector.stats.attested == 2
    check(bench.loader.read_bytes(object_fetch, 0, FILE.size), "a.bin", "1")
    bench.loader.release_fetch(object_fetch)


def test_a_file_that_does_not_fit_into_the_cache_is_an_error_and_no_hang(make: Make) -> None:
    bench = make(limit=4 * BLOCK)
    with pytest.raises(StoreError, match="no room for all of it"):
        bench.open()


def test_an_outage_is_told_and_the_next_open_tries_again(make: Make) -> None:
    bench = make()

    def down(_version: ObjectVersion, _offset: int) -> None:
        raise UnavailableError("down")

    bench.origin.gate = down
    with pytest.raises(UnavailableError):
        bench.open()
    stats = bench.loader.stats
    wait_until(lambda: stats.flights_failed == stats.flights, "the last flight to fail", WAIT)
    bench.origin.gate = lambda _version, _offset: None
    object_fetch = bench.open()
    assert object_fetch.stored.is_servable
    bench.loader.release_fetch(object_fetch)


def test_a_version_that_is_gone_is_told(make: Make) -> None:
    bench = make()

    def gone(_version: ObjectVersion, _offset: int) -> None:
        raise VersionChangedError("replaced")

    bench.origin.gate = gone
    with pytest.raises(VersionChangedError):
        bench.open()
    assert bench.library.lost == ["a.bin"]


def test_an_empty_file_is_held_against_its_manifest_too(make: Make) -> None:
    right, wrong, unknown = version("right", 0), version("wrong", 0), version("unknown", 0)
    bench = make(ScriptedOrigin([right, wrong, unknown]))
    bench.origin.digests.update({right.id: hashlib.sha256(b"").digest(), wrong.id: bytes(32)})
    bench.loader.release_fetch(bench.open(right))
    for found in (wrong, unknown):
        with pytest.raises(AttestationError):
            bench.open(found)


def test_an_open_that_is_given_up_leaves_nothing_behind(make: Make) -> None:
    bench = make()
    step = Step()
    bench.origin.gate = step.hold_from(4 * BLOCK)
    object_fetch = bench.inspector.open_attestable(FILE, "")
    waiter = bench.loader.await_attestation(object_fetch, lambda _waiter: None)
    assert waiter is not None
    assert step.arrived()
    assert bench.loader.cancel_waiter(waiter)
    bench.loader.release_fetch(object_fetch)
    step.open()
    bench.library.wait("a.bin")  # what was begun goes on
    wait_until(lambda: bench.loader.progress()["loads"] == 0, "the load to be closed", WAIT)
    assert bench.mark() is AttestationState.ATTESTED


def test_the_time_of_who_waits_at_the_gate_goes_on_while_anything_moves(make: Make) -> None:
    bench = make()
    step = Step()
    bench.origin.gate = step.hold_from(0)
    object_fetch = bench.inspector.open_attestable(FILE, "")
    waiter = bench.loader.await_attestation(object_fetch, lambda _waiter: None)
    assert waiter is not None
    gate = bench.loader.attestation_gate
    with bench.loader.lock:
        assert not gate.is_expired_locked(waiter, waiter.deadline - 1)
        assert gate.is_expired_locked(waiter, waiter.deadline)
        gate.note_progress_locked(waiter.deadline - 5)
        assert not gate.is_expired_locked(waiter, waiter.deadline)
        assert gate.is_expired_locked(waiter, waiter.deadline + 25)
    bench.loader.cancel_waiter(waiter)
    step.open()
    bench.loader.release_fetch(object_fetch)


def test_many_files_at_once(make: Make) -> None:
    files = [version(f"{n}.bin", 6 * BLOCK + n) for n in range(12)]
    origin = ScriptedOrigin(files)
    origin.digests.update({found.id: sha256(found) for found in files})
    origin.digests[files[5].id] = bytes(32)
    bench = make(origin)
    outcomes: dict[int, object] = {}

    def work(number: int) -> None:
        try:
            object_fetch = bench.open(files[number])
            outcomes[number] = bench.loader.read_bytes(object_fetch, 0, files[number].size)
            bench.loader.release_fetch(object_fetch)
        except AttestationError as error:
            outcomes[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in (*range(12), *range(12))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert isinstance(outcomes.pop(5), AttestationError)
    for number, data in outcomes.items():
        assert isinstance(data, bytes)
        check(data, f"{number}.bin", "1")
    assert len(outcomes) == 11
    assert bench.inspector.stats.attested == 11
    assert sum(length for _, _, length in origin.reads) == sum(found.size for found in files)
