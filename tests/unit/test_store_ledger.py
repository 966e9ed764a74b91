"""Space accounting between processes: never too low, and mended by a recount."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from fusecache.errors import StoreError
from fusecache.store import files as fs
from fusecache.store import format
from fusecache.store.files import Layout
from fusecache.store.ledger import Ledger
from fusecache.store.records import Record, Records
from fusecache.store.store import Store
from fusecache.types import ObjectVersion

BLOCK = 4096
VERSION = ObjectVersion("mem://b", "k", "e", 8 * BLOCK, 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    made = Ledger(path, empty=True)
    yield made
    made.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "cache", limit=100 * BLOCK, free_floor=0, block_size=BLOCK) as made:
        assert made.wait_scanned(30)
        yield made


def fill(store: Store, blocks: range, *, commit: bool = True) -> None:
    stored = store.open(VERSION)
    for block in blocks:
        assert stored.reserve(BLOCK)
        stored.write(block * BLOCK, bytes((block,)) * BLOCK)
        if commit:
            stored.commit(block, xxhash.xxh3_64_intdigest(bytes((block,)) * BLOCK))
    stored.close()


def disk_usage(store: Store) -> int:
    data = Layout(store.directory).data
    return sum(path.stat().st_blocks * 512 for path in data.rglob("*") if path.is_file())


def test_the_limit_is_over_all_slots(ledger: Ledger, path: Path) -> None:
    other = Ledger(path, empty=False)
    assert ledger.reserve(60, 100) == 0
    assert other.reserve(60, 100) == 20
    assert other.reserve(40, 100) == 0
    assert ledger.used() == other.used() == 100
    ledger.commit(60, 60)
    assert other.used() == 100
    other.unreserve(10)
    ledger.evict(50)
    assert ledger.used() == 40
    other.close()
    assert ledger.used() == 10  # what it had reserved ended with it


def test_what_a_dead_process_reserved_is_void_and_what_it_stored_counts(ledger: Ledger, path: Path) -> None:
    dead = Ledger(path, empty=False)
    dead.commit(30, 0)
    assert dead.reserve(50, 100) == 0
    assert not ledger.drop_dead()  # it lives
    dead._map, mapping = None, dead._map  # type: ignore[assignment]
    dead._view.release()
    mapping.close()
    fs.os.close(dead._fd)  # the kernel's part of a kill
    assert ledger.used() == 80
    assert ledger.drop_dead()
    assert not ledger.drop_dead()
    assert ledger.used() == 30


def test_a_slot_is_used_again_with_its_counters(ledger: Ledger, path: Path) -> None:
    for _ in range(3):
        other = Ledger(path, empty=False)
        other.commit(10, 0)
        other.close()
    assert ledger.used() == 30
    assert format.sum_slots(ledger._view).pid == 0
    assert format.parse_slot(ledger._view, 2).pid == 0


def test_all_slots_taken_is_one_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format, "LEDGER_SLOTS", 2)
    monkeypatch.setattr(format, "valid_ledger", lambda _: True)
    held = [Ledger(path, empty=True), Ledger(path, empty=False)]
    with pytest.raises(StoreError, match="in use by 2 processes"):
        Ledger(path, empty=False)
    for one in held:
        one.close()


def test_a_recount_corrects_both_ways(ledger: Ledger) -> None:
    ledger.commit(100, 0)
    ledger.marked(100)
    for counted in (70, 130):
        before = ledger.start_recount()
        assert before is not None
        ledger.finish_recount(before, counted)
        assert ledger.used() == counted


def test_a_recount_that_was_given_up_changes_nothing(ledger: Ledger, path: Path) -> None:
    ledger.commit(100, 0)
    other = Ledger(path, empty=False)
    before = ledger.start_recount()
    assert before is not None
    assert other.start_recount() is None  # one at a time
    assert ledger.finish_recount(before, None) == 0
    assert ledger.used() == 100
    assert other.start_recount() is not None
    other.close()


def test_a_recount_does_not_lose_a_block_that_is_counted_and_not_yet_marked(ledger: Ledger) -> None:
    ledger.commit(100, 0)
    ledger.marked(100)
    ledger.commit(10, 0)
    before = ledger.start_recount()
    assert before is not None
    assert ledger.finish_recount(before, 100) == 0  # the walk did not see it
    ledger.marked(10)
    assert ledger.used() == 110


def test_a_recount_in_the_middle_of_an_eviction_does_not_take_it_off_twice(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, range(8))
    monkeypatch.setattr(fs, "LOCK_TIMEOUT", 0.0)
    real = store._ledger.evict

    def evict(nbytes: int) -> None:
        store._scanner._recount()  # the files are unlinked, and not yet counted as evicted
        real(nbytes)

    monkeypatch.setattr(store._ledger, "evict", evict)
    store.evict(VERSION.id)
    tally = store._ledger.tally()
    assert tally.correction + tally.committed - tally.evicted == 0


def test_a_recount_in_the_middle_of_a_creation_does_not_lose_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fs, "LOCK_TIMEOUT", 0.0)
    real = fs.create

    def create(*args: Any) -> fs.ObjectFiles:
        store._scanner._recount()
        return real(*args)

    monkeypatch.setattr(fs, "create", create)
    fill(store, range(2))
    assert store.usage().used == disk_usage(store) == 3 * BLOCK


def test_a_creation_that_fails_is_not_counted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(*_: Any) -> fs.ObjectFiles:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fs, "create", create)
    stored = store.open(VERSION)
    assert not stored.reserve(BLOCK)
    stored.close()
    assert store.usage().used == 0


def test_space_of_what_was_written_and_not_committed_is_given_back(store: Store) -> None:
    fill(store, range(3))
    fill(store, range(3, 7), commit=False)
    assert disk_usage(store) == store.usage().used == 4 * BLOCK
    stored = store.open(VERSION)
    assert [stored.present(b) for b in range(8)] == [True] * 3 + [False] * 5
    view = stored.view()
    assert view is not None
    assert bytes(view) == b"".join(bytes((b,)) * BLOCK for b in range(3)) + bytes(5 * BLOCK)
    stored.close()


def test_space_of_what_another_process_is_writing_is_left_alone(store: Store, tmp_path: Path) -> None:
    fill(store, range(3))
    other = Store(tmp_path / "cache", limit=100 * BLOCK, free_floor=0, block_size=BLOCK)
    stored = other.open(VERSION)
    assert stored.reserve(BLOCK)
    stored.write(5 * BLOCK, b"x" * BLOCK)
    fill(store, range(3, 4), commit=False)
    fs.trim(Layout(store.directory), VERSION.id)
    stored.commit(5, xxhash.xxh3_64_intdigest(b"x" * BLOCK))
    view = stored.view()
    assert view is not None
    assert bytes(view[5 * BLOCK : 6 * BLOCK]) == b"x" * BLOCK
    stored.close()
    other.close()


def test_the_scan_does_not_overwrite_what_happened_since_it_read_a_file() -> None:
    records = Records()
    old = Record(VERSION, BLOCK, 0, BLOCK, False, False, 1)
    new = Record(VERSION, BLOCK, BLOCK, 2 * BLOCK, False, False, 2)
    records.watch(VERSION.id)
    records.put(VERSION.id, new)
    records.put_watched(VERSION.id, old)
    assert records.get(VERSION.id) == new
    records.watch(VERSION.id)
    records.drop(VERSION.id)
    records.put_watched(VERSION.id, old)
    assert records.get(VERSION.id) is None
    records.watch(VERSION.id)
    records.put_watched(VERSION.id, old)
    assert records.get(VERSION.id) == old
