"""A loader whose blocks come from elsewhere than the origin: checksums, blocks that come again, routes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import xxhash

from fusecache.errors import UnavailableError
from fusecache.loader.interface import Again, Expect, LoaderSettings, Route
from fusecache.loader.loader import Loader
from fusecache.store.store import Store
from fusecache.types import ObjectVersion

BLOCK = 64 << 10
BLOCKS = 12
SIZE = BLOCKS * BLOCK - 100
DATA = bytes(range(256)) * (BLOCKS * BLOCK // 256)
VERSION = ObjectVersion("o", "model.bin", "e", SIZE, 1)
WAIT = 20.0


class Library:
    def siblings(self, version: ObjectVersion) -> Sequence[ObjectVersion]:
        return [version]

    def completed(self, version: ObjectVersion) -> None:
        pass

    def gone(self, version: ObjectVersion) -> None:
        pass


class Script:
    """A supplier of every second stripe of two blocks; `mischief` may spoil what it gives."""

    crew = 3

    def __init__(self, *, keep: bool = True) -> None:
        self.keep = keep
        self.asked: list[tuple[str, range]] = []
        self.mischief: Callable[[int, int], str] = lambda block, attempt: ""
        self.attempts: dict[int, int] = {}
        self.bad: list[int] = []

    def abreast(self) -> int:
        return self.crew

    def route(self, version: ObjectVersion, block_size: int) -> Route | None:
        return Route(2, bytes(stripe % 2 for stripe in range(BLOCKS // 2)), range(BLOCKS // 2), self.keep)

    def supply(
        self,
        version: ObjectVersion,
        source: str,
        blocks: range,
        block_size: int,
        *,
        deadline: float,
        cancelled: Callable[[], bool],
        urgent: bool,
    ) -> Iterator[bytes | Expect | Again]:
        self.asked.append((threading.current_thread().name.partition("-")[0], blocks))
        for block in blocks:
            data = DATA[block * BLOCK : min(SIZE, (block + 1) * BLOCK)]
            while True:
                attempt = self.attempts[block] = self.attempts.get(block, 0) + 1
                mischief = self.mischief(block, attempt)
                if mischief == "break":
                    yield data[:1000]
                    yield Again()
                    continue
                if mischief == "fail":
                    raise UnavailableError("on purpose")
                expect = Expect(xxhash.xxh3_64_intdigest(data) or 1)
                yield expect
                yield data[:5000]
                yield (b"x" * (len(data) - 5000)) if mischief == "lie" else data[5000:]
                if not expect.bad:
                    break
                self.bad.append(block)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[Script], Loader]]:
    opened: list[Loader] = []
    store = Store(tmp_path / "cache", limit=1 << 30, free_floor=0, block_size=BLOCK)

    def build(script: Script) -> Loader:
        settings = LoaderSettings(concurrency=4, range_bytes=8 * BLOCK, deadline=15.0)
        loader = Loader(store, {}, Library(), settings, script)
        loader.start()
        opened.append(loader)
        return loader

    yield build
    for loader in opened:
        loader.close()
    store.close()


def read(loader: Loader) -> bytes:
    load = loader.open(VERSION, "")
    try:
        return loader.read(load, 0, SIZE)
    finally:
        loader.release(load)


def test_remote_stripes_are_fetched_by_their_own_crew_one_stripe_at_a_time(
    start: Callable[[Script], Loader],
) -> None:
    script = Script()
    assert read(start(script)) == DATA[:SIZE]
    for crew, blocks in script.asked:
        assert blocks.start // 2 == (blocks.stop - 1) // 2
        assert crew == ("peers" if blocks.start // 2 % 2 else "loader")


@pytest.mark.parametrize("mischief", ["break", "lie"])
def test_a_block_that_comes_wrong_comes_again(start: Callable[[Script], Loader], mischief: str) -> None:
    script = Script()
    script.mischief = lambda block, attempt: mischief if attempt == 1 and block % 3 == 0 else ""
    assert read(start(script)) == DATA[:SIZE]
    assert sorted(script.bad) == ([0, 3, 6, 9] if mischief == "lie" else [])


def test_a_supplier_that_fails_is_an_error_for_who_waits_and_no_more(
    start: Callable[[Script], Loader],
) -> None:
    script = Script()
    script.mischief = lambda block, attempt: "fail" if block == 2 and attempt < 3 else ""
    loader = start(script)
    with pytest.raises(UnavailableError):
        read(loader)
    script.mischief = lambda block, attempt: ""
    assert read(loader) == DATA[:SIZE]


def test_an_unforeseen_error_is_told_to_who_waits(start: Callable[[Script], Loader]) -> None:
    script = Script()

    def surprise(block: int, attempt: int) -> str:
        raise RuntimeError("nobody thought of this")

    script.mischief = surprise
    with pytest.raises(UnavailableError, match="RuntimeError"):
        read(start(script))


def test_what_is_not_kept_is_read_all_the_same(start: Callable[[Script], Loader]) -> None:
    script = Script(keep=False)
    loader = start(script)
    assert read(loader) == DATA[:SIZE]
    load = loader.open(VERSION, "")
    present = [load.stored.present(block) for block in range(BLOCKS)]
    loader.release(load)
    assert not any(present[block] for block in range(BLOCKS) if block // 2 % 2)
    assert loader.seconds_left(load) == float("inf")
