"""The loader with the real store and an origin whose every step the test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import xxhash

from fusecache.errors import (
    AccessDeniedError,
    FusecacheError,
    NotFoundError,
    UnavailableError,
    VersionChangedError,
)
from fusecache.events import EventHub
from fusecache.fetch.block_source import OriginBlockSource
from fusecache.fetch.object_fetch import ObjectFetch
from fusecache.fetch.service import FetchService
from fusecache.fetch.settings import FetchSettings
from fusecache.fetch.waiter import Waiter
from fusecache.prefetch.interface import PrefetchSettings
from fusecache.prefetch.prefetcher import Prefetcher
from fusecache.store.store import Store
from fusecache.types import ObjectVersion
from tests.support.content import check, content
from tests.support.scripted import WAIT, ScriptedOrigin, Step, version

BLOCK = 64 << 10


class RecordingCatalog:
    """A catalog, and a node's events: what was completed, and what was lost."""

    def __init__(self, versions: Sequence[ObjectVersion]) -> None:
        self.versions = list(versions)
        self.complete: dict[str, threading.Event] = {found.key: threading.Event() for found in versions}
        self.lost: list[str] = []
        self.events = EventHub()
        self.events.object_completed.subscribe(self.version_completed)
        self.events.object_gone.subscribe(self.version_gone)

    def siblings(self, version: ObjectVersion) -> Sequence[ObjectVersion]:
        return self.versions

    def version_completed(self, version: ObjectVersion) -> None:
        self.complete.setdefault(version.key, threading.Event()).set()

    def version_gone(self, version: ObjectVersion) -> None:
        self.lost.append(version.key)

    def wait(self, key: str) -> None:
        assert self.complete[key].wait(WAIT), f"{key} never became complete"


def fetching(
    store: Store,
    origin: ScriptedOrigin,
    catalog: RecordingCatalog,
    settings: FetchSettings,
    prefetch_settings: PrefetchSettings | None = None,
) -> FetchService:
    """A service that fetches from one origin, with a prefetcher that keeps no profiles."""
    fetch_service = FetchService(store, OriginBlockSource({"": origin}), settings, events=catalog.events)
    Prefetcher(fetch_service, catalog, prefetch_settings or PrefetchSettings(is_enabled=settings.prefetch))
    return fetch_service


class Bench:
    """A service with everything around it."""

    def __init__(
        self,
        directory: Path,
        versions: Sequence[ObjectVersion],
        *,
        limit: int = 1 << 30,
        settings: FetchSettings,
        prefetch_budget: int = 1 << 62,
    ) -> None:
        self.origin = ScriptedOrigin(versions, chunk=BLOCK // 2)
        self.store = Store(directory, limit=limit, free_floor=0, block_size=BLOCK)
        self.library = RecordingCatalog(versions)
        prefetch_settings = PrefetchSettings(is_enabled=settings.prefetch, budget=prefetch_budget)
        self.loader = fetching(self.store, self.origin, self.library, settings, prefetch_settings)
        before = set(threading.enumerate())
        self.loader.start()
        self.threads = set(threading.enumerate()) - before

    def close(self) -> None:
        self.loader.close()
        self.store.close()
        assert not [thread for thread in self.threads if thread.is_alive()]


Make = Callable[..., Bench]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    benches: list[Bench] = []

    def build(
        *versions: ObjectVersion,
        limit: int = 1 << 30,
        prefetch_budget: int = 1 << 62,
        **settings: object,
    ) -> Bench:
        values = {"concurrency": 8, "range_bytes": 4 * BLOCK, "deadline": 30.0, **settings}
        bench = Bench(
            tmp_path / "cache",
            versions,
            limit=limit,
            settings=FetchSettings(**values),  # type: ignore[arg-type]
            prefetch_budget=prefetch_budget,
        )
        benches.append(bench)
        return bench

    yield build
    for bench in benches:
        bench.close()


class Result:
    """Waits for one request."""

    def __init__(self, bench: Bench, object_fetch: ObjectFetch, offset: int, length: int) -> None:
        self._done = threading.Event()
        self._bench, self._load, self._offset, self._length = bench, object_fetch, offset, length
        self.calls = 0
        self.waiter = bench.loader.request_bytes(object_fetch, offset, length, self._settled)

    def _settled(self, waiter: Waiter) -> None:
        self.calls += 1
        self._done.set()

    @property
    def done(self) -> bool:
        return self.waiter is None or self._done.is_set()

    def get(self) -> bytes:
        pieces = {}
        if self.waiter is not None:
            assert self._done.wait(WAIT), "the reader was never answered"
            if self.waiter.error is not None:
                raise self.waiter.error
            pieces = self.waiter.pieces
        data = self._bench.loader.copy_bytes(self._load, self._offset, self._length, pieces)
        assert data is not None
        return data


def test_the_first_read_fetches_all_of_the_file_once(make: Make) -> None:
    file = version("a.bin", 20 * BLOCK + 5)
    bench = make(file)
    object_fetch = bench.loader.open_object(file, "")
    check(bench.loader.read_bytes(object_fetch, 100, 50), "a.bin", "1", 100)
    bench.library.wait("a.bin")
    check(bench.loader.read_bytes(object_fetch, 0, file.size), "a.bin", "1")
    assert sum(length for _, _, length in bench.origin.reads) == file.size
    assert object_fetch.stored.is_complete
    bench.loader.release_fetch(object_fetch)


def test_without_prefetch_only_what_is_asked_for_is_fetched(make: Make) -> None:
    file = version("a.bin", 20 * BLOCK)
    bench = make(file, prefetch=False)
    object_fetch = bench.loader.open_object(file, "")
    check(bench.loader.read_bytes(object_fetch, 9 * BLOCK, 10), "a.bin", "1", 9 * BLOCK)
    assert [offset for _, offset, _ in bench.origin.reads] == [9 * BLOCK]
    bench.loader.release_fetch(object_fetch)


def test_a_waiter_is_woken_by_its_own_block_and_not_by_its_range(make: Make) -> None:
    file = version("a.bin", 4 * BLOCK)
    bench = make(file)
    step = Step()
    bench.origin.gate = step.hold_from(BLOCK)
    object_fetch = bench.loader.open_object(file, "")
    first, last = Result(bench, object_fetch, 0, 10), Result(bench, object_fetch, 3 * BLOCK, 10)
    check(first.get(), "a.bin", "1")
    assert step.arrived()
    assert not last.done
    step.open()
    check(last.get(), "a.bin", "1", 3 * BLOCK)
    assert len(bench.origin.reads) == 1
    bench.loader.release_fetch(object_fetch)


def test_many_readers_of_one_block_cost_one_request(make: Make) -> None:
    file = version("a.bin", BLOCK)
    bench = make(file)
    step = Step()
    bench.origin.gate = step.hold_from(0)
    object_fetch = bench.loader.open_object(file, "")
    results = [Result(bench, object_fetch, n, BLOCK - n) for n in range(64)]
    assert step.arrived()
    step.open()
    for n, result in enumerate(results):
        check(result.get(), "a.bin", "1", n)
        assert result.calls == 1
    assert len(bench.origin.reads) == 1
    bench.loader.release_fetch(object_fetch)


def test_a_read_over_many_ranges_is_answered_once_and_whole(make: Make) -> None:
    file = version("a.bin", 33 * BLOCK + 17)
    bench = make(file)
    object_fetch = bench.loader.open_object(file, "")
    result = Result(bench, object_fetch, 7, file.size - 7)
    check(result.get(), "a.bin", "1", 7)
    assert result.calls <= 1
    bench.loader.release_fetch(object_fetch)


def test_a_jump_does_not_queue_behind_the_prefetch(make: Make) -> None:
    file = version("a.bin", 400 * BLOCK)
    bench = make(file)
    step = Step()
    object_fetch = bench.loader.open_object(file, "")

    def gate(found: ObjectVersion, offset: int) -> None:
        if not 390 * BLOCK <= offset < 391 * BLOCK:
            step.hold_from(0)(found, offset)

    bench.origin.gate = gate
    first = Result(bench, object_fetch, 0, 1)
    assert step.arrived()
    check(Result(bench, object_fetch, 390 * BLOCK, 10).get(), "a.bin", "1", 390 * BLOCK)
    assert not first.done
    step.open()
    first.get()
    bench.library.wait("a.bin")
    bench.loader.release_fetch(object_fetch)


def test_the_following_shards_are_fetched_in_the_order_of_the_index(make: Make) -> None:
    names = [f"m-{n}.safetensors" for n in range(4)]
    order = [names[2], names[0], names[3], names[1]]
    index = json.dumps({"weight_map": {str(n): name for n, name in enumerate(order)}}).encode()
    index_version = version("m.safetensors.index.json", len(index))
    shards = [version(name, 2 * BLOCK) for name in names]
    bench = make(*shards, index_version, concurrency=1)
    stored = bench.store.open(index_version)
    assert stored.reserve_bytes(len(index))
    stored.write(0, index)
    stored.commit_block(0, xxhash.xxh3_64_intdigest(index))
    object_fetch = bench.loader.open_object(shards[2], "")
    bench.loader.read_bytes(object_fetch, 0, 1)
    for name in names:
        bench.library.wait(name)
    firsts = list(dict.fromkeys(key for key, _, _ in bench.origin.reads))
    # what is read is fetched by another thread than what follows: either may come first
    assert [name for name in firsts if name != order[0]] == order[1:]
    bench.loader.release_fetch(object_fetch)
    stored.close()


def test_the_budget_bounds_what_is_fetched_ahead(make: Make) -> None:
    shards = [version(f"m-{n}-of-5.safetensors", 2 * BLOCK) for n in range(5)]
    bench = make(*shards, prefetch_budget=5 * BLOCK)
    object_fetch = bench.loader.open_object(shards[0], "")
    bench.loader.read_bytes(object_fetch, 0, 1)
    for number in range(3):
        bench.library.wait(f"m-{number}-of-5.safetensors")
    assert {key for key, _, _ in bench.origin.reads} == {f"m-{n}-of-5.safetensors" for n in range(3)}
    bench.loader.release_fetch(object_fetch)


def test_without_space_readers_are_served_from_memory(make: Make) -> None:
    file = version("a.bin", 8 * BLOCK)
    bench = make(file, limit=1)
    object_fetch = bench.loader.open_object(file, "")
    check(bench.loader.read_bytes(object_fetch, BLOCK - 5, 2 * BLOCK), "a.bin", "1", BLOCK - 5)
    check(bench.loader.read_bytes(object_fetch, 7 * BLOCK, BLOCK), "a.bin", "1", 7 * BLOCK)
    assert bench.loader.stats.bytes_uncached >= 4 * BLOCK
    assert object_fetch.stored.cached_bytes() == 0
    bench.loader.release_fetch(object_fetch)


def test_a_changed_object_fails_its_readers_and_is_reported_once(make: Make) -> None:
    file = version("a.bin", 8 * BLOCK)
    bench = make(file, prefetch=False)

    def gate(_version: ObjectVersion, offset: int) -> None:
        if offset >= 2 * BLOCK:
            raise VersionChangedError("a.bin changed")

    bench.origin.gate = gate
    object_fetch = bench.loader.open_object(file, "")
    check(bench.loader.read_bytes(object_fetch, 0, 10), "a.bin", "1")
    with pytest.raises(VersionChangedError):
        bench.loader.read_bytes(object_fetch, 5 * BLOCK, 10)
    with pytest.raises(VersionChangedError):
        bench.loader.read_bytes(object_fetch, 6 * BLOCK, 10)
    check(bench.loader.read_bytes(object_fetch, 0, 10), "a.bin", "1")
    assert bench.library.lost == ["a.bin"]
    bench.loader.release_fetch(object_fetch)


def test_a_deleted_object_is_a_changed_one(make: Make) -> None:
    file = version("a.bin", BLOCK)
    bench = make(file)

    def gate(_version: ObjectVersion, _offset: int) -> None:
        raise NotFoundError("a.bin: no such object")

    bench.origin.gate = gate
    object_fetch = bench.loader.open_object(file, "")
    with pytest.raises(VersionChangedError, match="deleted"):
        bench.loader.read_bytes(object_fetch, 0, 10)
    bench.loader.release_fetch(object_fetch)


@pytest.mark.parametrize("error", [UnavailableError("down"), AccessDeniedError("no")])
def test_a_failed_flight_tells_its_readers_and_the_next_read_tries_again(
    make: Make, error: FusecacheError
) -> None:
    file = version("a.bin", 2 * BLOCK)
    bench = make(file)

    def gate(_version: ObjectVersion, _offset: int) -> None:
        raise error

    bench.origin.gate = gate
    object_fetch = bench.loader.open_object(file, "")
    with pytest.raises(type(error)):
        bench.loader.read_bytes(object_fetch, 0, 10)
    bench.origin.gate = lambda _version, _offset: None
    check(bench.loader.read_bytes(object_fetch, 0, 2 * BLOCK), "a.bin", "1")
    bench.loader.release_fetch(object_fetch)


def test_a_waiter_that_nobody_serves_gets_an_error_at_its_deadline(make: Make) -> None:
    file = version("a.bin", BLOCK)
    bench = make(file, deadline=0.2)
    step = Step()
    bench.origin.gate = step.hold_from(0)
    object_fetch = bench.loader.open_object(file, "")
    with pytest.raises(UnavailableError, match="deadline"):
        bench.loader.read_bytes(object_fetch, 0, 10)
    step.open()
    bench.loader.release_fetch(object_fetch)


def test_a_cancelled_waiter_is_not_called_and_the_fetch_goes_on(make: Make) -> None:
    file = version("a.bin", BLOCK)
    bench = make(file)
    step = Step()
    bench.origin.gate = step.hold_from(0)
    object_fetch = bench.loader.open_object(file, "")
    result = Result(bench, object_fetch, 0, 10)
    assert result.waiter is not None
    assert step.arrived()
    assert bench.loader.cancel_waiter(result.waiter)
    assert not bench.loader.cancel_waiter(result.waiter)
    step.open()
    bench.library.wait("a.bin")
    assert result.calls == 0
    bench.loader.release_fetch(object_fetch)


def test_blocks_of_an_earlier_run_are_verified_and_not_fetched(make: Make, tmp_path: Path) -> None:
    file = version("a.bin", 6 * BLOCK)
    bench = make(file)
    object_fetch = bench.loader.open_object(file, "")
    bench.loader.read_bytes(object_fetch, 0, 1)
    bench.library.wait("a.bin")
    bench.loader.release_fetch(object_fetch)
    bench.close()
    data = next(path for path in (tmp_path / "cache" / "data").rglob("*.data"))
    with data.open("r+b") as raw:
        raw.seek(3 * BLOCK + 9)
        raw.write(bytes([content("a.bin", "1", 3 * BLOCK + 9, 1)[0] ^ 1]))
    again = make(file)
    object_fetch = again.loader.open_object(file, "")
    assert not object_fetch.stored.is_complete
    check(again.loader.read_bytes(object_fetch, 0, file.size), "a.bin", "1")
    again.library.wait("a.bin")
    assert [(offset, length) for _, offset, length in again.origin.reads] == [(3 * BLOCK, BLOCK)]
    again.loader.release_fetch(object_fetch)


def test_two_loaders_on_one_directory_fetch_each_block_once(tmp_path: Path) -> None:
    file = version("a.bin", 64 * BLOCK)
    settings = FetchSettings(concurrency=4, range_bytes=4 * BLOCK)
    benches = [Bench(tmp_path / "cache", [file], settings=settings) for _ in range(2)]
    try:
        loads = [bench.loader.open_object(file, "") for bench in benches]
        results = [
            Result(bench, object_fetch, 0, file.size)
            for bench, object_fetch in zip(benches, loads, strict=True)
        ]
        for result in results:
            check(result.get(), "a.bin", "1")
        fetched = sum(length for bench in benches for _, _, length in bench.origin.reads)
        assert fetched == file.size
        for bench, object_fetch in zip(benches, loads, strict=True):
            bench.loader.release_fetch(object_fetch)
    finally:
        for bench in benches:
            bench.close()


def test_an_empty_object_needs_nothing(make: Make) -> None:
    file = version("empty", 0)
    bench = make(file)
    object_fetch = bench.loader.open_object(file, "")
    assert bench.loader.read_bytes(object_fetch, 0, 100) == b""
    bench.loader.release_fetch(object_fetch)
    assert bench.origin.reads == []


def test_closing_answers_who_waits(make: Make) -> None:
    file = version("a.bin", BLOCK)
    bench = make(file)
    step = Step()
    bench.origin.gate = step.hold_from(0)
    object_fetch = bench.loader.open_object(file, "")
    result = Result(bench, object_fetch, 0, 10)
    assert step.arrived()
    threading.Timer(0.05, step.open).start()
    bench.loader.close()
    with pytest.raises(FusecacheError):
        result.get()
