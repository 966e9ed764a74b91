"""A loader whose blocks come from elsewhere than the origin: checksums, blocks that come again, routes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash

from fusecache.errors import UnavailableError
from fusecache.events import EventHub
from fusecache.fetch.block_source import BlockSink, Route, write_chunks
from fusecache.fetch.service import FetchService
from fusecache.fetch.settings import FetchSettings
from fusecache.store.store import Store
from fusecache.types import ObjectVersion

BLOCK = 64 << 10
BLOCKS = 12
SIZE = BLOCKS * BLOCK - 100
DATA = bytes(range(256)) * (BLOCKS * BLOCK // 256)
VERSION = ObjectVersion("o", "model.bin", "e", SIZE, 1)
WAIT = 20.0


class Script:
    """A supplier of every second stripe of two blocks; `mischief` may spoil what it gives."""

    peer_workers = 3

    def __init__(self, *, keep: bool = True) -> None:
        self.keep = keep
        self.asked: list[tuple[str, range]] = []
        self.mischief: Callable[[int, int], str] = lambda block, attempt: ""
        self.attempts: dict[int, int] = {}
        self.bad: list[int] = []

    def max_prefetch_flights(self) -> int:
        return self.peer_workers

    def route_of(self, version: ObjectVersion, block_size: int) -> Route | None:
        return Route(2, bytes(stripe % 2 for stripe in range(BLOCKS // 2)), range(BLOCKS // 2), self.keep)

    def send_blocks(
        self,
        version: ObjectVersion,
        source: str,
        blocks: range,
        block_size: int,
        sink: BlockSink,
        *,
        deadline: float,
        cancelled: Callable[[], bool],
        urgent: bool,
    ) -> None:
        self.asked.append((threading.current_thread().name.partition("-")[0], blocks))
        for block in blocks:
            data = DATA[block * BLOCK : min(SIZE, (block + 1) * BLOCK)]
            while True:
                attempt = self.attempts[block] = self.attempts.get(block, 0) + 1
                mischief = self.mischief(block, attempt)
                if mischief == "break":
                    sink.begin_block(None)
                    sink.write(memoryview(data)[:1000])
                    sink.restart_block()
                    continue
                if mischief == "fail":
                    raise UnavailableError("on purpose")
                sink.begin_block(xxhash.xxh3_64_intdigest(data) or 1)
                sink.write(memoryview(data)[:5000])
                sink.write(memoryview(b"x" * (len(data) - 5000) if mischief == "lie" else data[5000:]))
                if sink.end_block():
                    break
                self.bad.append(block)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[Script], FetchService]]:
    opened: list[FetchService] = []
    store = Store(tmp_path / "cache", limit=1 << 30, free_floor=0, block_size=BLOCK)

    def build(script: Script) -> FetchService:
        settings = FetchSettings(concurrency=4, range_bytes=8 * BLOCK, deadline=15.0)
        fetch_service = FetchService(store, script, settings, events=EventHub())
        fetch_service.start()
        opened.append(fetch_service)
        return fetch_service

    yield build
    for fetch_service in opened:
        fetch_service.close()
    store.close()


def read(loader: FetchService) -> bytes:
    object_fetch = loader.open_object(VERSION, "")
    try:
        return loader.read_bytes(object_fetch, 0, SIZE)
    finally:
        loader.release_fetch(object_fetch)


def test_remote_stripes_are_fetched_by_their_own_crew_one_stripe_at_a_time(
    start: Callable[[Script], FetchService],
) -> None:
    script = Script()
    assert read(start(script)) == DATA[:SIZE]
    for worker_pool, blocks in script.asked:
        assert blocks.start // 2 == (blocks.stop - 1) // 2
        assert worker_pool == ("peers" if blocks.start // 2 % 2 else "fetch")


@pytest.mark.parametrize("mischief", ["break", "lie"])
def test_a_block_that_comes_wrong_comes_again(start: Callable[[Script], FetchService], mischief: str) -> None:
    script = Script()
    script.mischief = lambda block, attempt: mischief if attempt == 1 and block % 3 == 0 else ""
    assert read(start(script)) == DATA[:SIZE]
    assert sorted(script.bad) == ([0, 3, 6, 9] if mischief == "lie" else [])


def test_a_supplier_that_fails_is_an_error_for_who_waits_and_no_more(
    start: Callable[[Script], FetchService],
) -> None:
    script = Script()
    script.mischief = lambda block, attempt: "fail" if block == 2 and attempt < 3 else ""
    fetch_service = start(script)
    with pytest.raises(UnavailableError):
        read(fetch_service)
    script.mischief = lambda block, attempt: ""
    assert read(fetch_service) == DATA[:SIZE]


def test_an_unforeseen_error_is_told_to_who_waits(start: Callable[[Script], FetchService]) -> None:
    script = Script()

    def surprise(block: int, attempt: int) -> str:
        raise RuntimeError("nobody thought of this")

    script.mischief = surprise
    with pytest.raises(UnavailableError, match="RuntimeError"):
        read(start(script))


def test_what_is_not_kept_is_read_all_the_same(start: Callable[[Script], FetchService]) -> None:
    script = Script(keep=False)
    fetch_service = start(script)
    assert read(fetch_service) == DATA[:SIZE]
    object_fetch = fetch_service.open_object(VERSION, "")
    present = [object_fetch.stored.is_present(block) for block in range(BLOCKS)]
    fetch_service.release_fetch(object_fetch)
    assert not any(present[block] for block in range(BLOCKS) if block // 2 % 2)
    assert fetch_service.seconds_until_complete(object_fetch) == float("inf")


class RecordedSink:
    """Takes down what is written, and finds every block right."""

    def __init__(self) -> None:
        self.blocks: list[bytearray] = []

    def begin_block(self, checksum: int | None) -> None:
        assert checksum is None
        self.blocks.append(bytearray())

    def write(self, view: memoryview) -> None:
        self.blocks[-1] += view

    def end_block(self) -> bool:
        return True

    def restart_block(self) -> None:
        raise AssertionError("nothing comes again")


@pytest.mark.parametrize("chunk", [1, 7, 10, 25, 1000])
def test_chunks_are_cut_at_the_ends_of_blocks(chunk: int) -> None:
    sink = RecordedSink()
    data = bytes(range(34))
    chunks = (data[start : start + chunk] for start in range(0, len(data), chunk))
    write_chunks(chunks, range(2, 6), 10, 54, sink)
    assert [bytes(block) for block in sink.blocks] == [data[:10], data[10:20], data[20:30], data[30:]]
