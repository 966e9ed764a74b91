"""Space accounting between processes: never too low, and mended by a recount."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from fusecache.errors import StoreError
from fusecache.store.disk import files as fs
from fusecache.store.disk import format
from fusecache.store.disk.directory import CacheDirectory
from fusecache.store.disk.ledger import Ledger
from fusecache.store.records import ObjectRecord, ObjectTable
from fusecache.store.store import Store
from fusecache.types import ObjectVersion
from tests.support.live import background
from tests.unit.test_store import data_of

BLOCK = 4096
VERSION = ObjectVersion("mem://b", "k", "e", 8 * BLOCK, 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    made = Ledger(path, is_empty=True)
    yield made
    made.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "cache", limit=100 * BLOCK, free_floor=0, block_size=BLOCK) as made:
        assert made.wait_for_scan(30)
        yield made


def fill(store: Store, blocks: range, *, commit: bool = True) -> None:
    stored = store.open(VERSION)
    for block in blocks:
        assert stored.reserve_bytes(BLOCK)
        stored.write(block * BLOCK, bytes((block,)) * BLOCK)
        if commit:
            stored.commit_block(block, xxhash.xxh3_64_intdigest(bytes((block,)) * BLOCK))
    stored.close()


def disk_usage(store: Store) -> int:
    data = CacheDirectory(store.directory).data_root
    return sum(path.stat().st_blocks * 512 for path in data.rglob("*") if path.is_file())


def test_the_limit_is_over_all_slots(ledger: Ledger, path: Path) -> None:
    other = Ledger(path, is_empty=False)
    assert ledger.reserve_bytes(60, 100) == 0
    assert other.reserve_bytes(60, 100) == 20
    assert other.reserve_bytes(40, 100) == 0
    assert ledger.used_bytes() == other.used_bytes() == 100
    ledger.count_committed(60, 60)
    assert other.used_bytes() == 100
    other.unreserve_bytes(10)
    ledger.count_evicted(50)
    assert ledger.used_bytes() == 40
    other.close()
    assert ledger.used_bytes() == 10  # what it had reserved ended with it


def test_what_a_dead_process_reserved_is_void_and_what_it_stored_counts(ledger: Ledger, path: Path) -> None:
    dead = Ledger(path, is_empty=False)
    dead.count_committed(30, 0)
    assert dead.reserve_bytes(50, 100) == 0
    assert not ledger.void_dead_reservations()  # it lives
    dead._map, mapping = None, dead._map  # type: ignore[assignment]
    dead._view.release()
    mapping.close()
    fs.os.close(dead._fd)  # the kernel's part of a kill
    assert ledger.used_bytes() == 80
    assert ledger.void_dead_reservations()
    assert not ledger.void_dead_reservations()
    assert ledger.used_bytes() == 30


def test_a_slot_is_used_again_with_its_counters(ledger: Ledger, path: Path) -> None:
    for _ in range(3):
        other = Ledger(path, is_empty=False)
        other.count_committed(10, 0)
        other.close()
    assert ledger.used_bytes() == 30
    assert format.sum_slots(ledger._view).pid == 0
    assert format.parse_slot(ledger._view, 2).pid == 0


def test_all_slots_taken_is_one_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format, "LEDGER_SLOTS", 2)
    monkeypatch.setattr(format, "is_valid_ledger", lambda _: True)
    held = [Ledger(path, is_empty=True), Ledger(path, is_empty=False)]
    with pytest.raises(StoreError, match="in use by 2 processes"):
        Ledger(path, is_empty=False)
    for one in held:
        one.close()


def test_a_recount_corrects_both_ways(ledger: Ledger) -> None:
    ledger.count_committed(100, 0)
    ledger.clear_pending(100)
    for counted in (70, 130):
        before = ledger.start_recount()
        assert before is not None
        ledger.finish_recount(before, counted)
        assert ledger.used_bytes() == counted


def test_a_recount_that_was_given_up_changes_nothing(ledger: Ledger, path: Path) -> None:
    ledger.count_committed(100, 0)
    other = Ledger(path, is_empty=False)
    before = ledger.start_recount()
    assert before is not None
    assert other.start_recount() is None  # one at a time
    assert ledger.finish_recount(before, None) == 0
    assert ledger.used_bytes() == 100
    assert other.start_recount() is not None
    other.close()


def test_a_recount_does_not_lose_a_block_that_is_counted_and_not_yet_marked(ledger: Ledger) -> None:
    ledger.count_committed(100, 0)
    ledger.clear_pending(100)
    ledger.count_committed(10, 0)
    before = ledger.start_recount()
    assert before is not None
    assert ledger.finish_recount(before, 100) == 0  # the walk did not see it
    ledger.clear_pending(10)
    assert ledger.used_bytes() == 110


def test_a_recount_in_the_middle_of_an_eviction_does_not_take_it_off_twice(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, range(8))
    monkeypatch.setattr("fusecache.store.disk.directory.LOCK_TIMEOUT", 0.0)
    real = store._ledger.count_evicted

    def evict(nbytes: int) -> None:
        # the files are unlinked, and not yet counted as evicted
        background(store._scanner._recount_ledger).result(10)
        real(nbytes)

    monkeypatch.setattr(store._ledger, "count_evicted", evict)
    store.evict(VERSION.id)
    tally = store._ledger.tally()
    assert tally.correction + tally.committed - tally.evicted == 0


def test_a_recount_in_the_middle_of_a_creation_does_not_lose_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusecache.store.disk.directory.LOCK_TIMEOUT", 0.0)
    real = fs.create_object_files

    def create(*args: Any) -> fs.ObjectFiles:
        background(store._scanner._recount_ledger).result(10)
        return real(*args)

    monkeypatch.setattr(fs, "create_object_files", create)
    fill(store, range(2))
    assert store.usage().used == disk_usage(store) == 3 * BLOCK


def test_a_creation_that_fails_is_not_counted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(*_: Any) -> fs.ObjectFiles:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fs, "create_object_files", create)
    stored = store.open(VERSION)
    assert not stored.reserve_bytes(BLOCK)
    stored.close()
    assert store.usage().used == 0


def test_space_of_what_was_written_and_not_committed_is_given_back(store: Store) -> None:
    fill(store, range(3))
    fill(store, range(3, 7), commit=False)
    assert disk_usage(store) == store.usage().used == 4 * BLOCK
    stored = store.open(VERSION)
    assert [stored.is_present(b) for b in range(8)] == [True] * 3 + [False] * 5
    assert data_of(stored) == b"".join(bytes((b,)) * BLOCK for b in range(3)) + bytes(5 * BLOCK)
    stored.close()


def test_space_of_what_another_process_is_writing_is_left_alone(store: Store, tmp_path: Path) -> None:
    fill(store, range(3))
    other = Store(tmp_path / "cache", limit=100 * BLOCK, free_floor=0, block_size=BLOCK)
    stored = other.open(VERSION)
    assert stored.reserve_bytes(BLOCK)
    stored.write(5 * BLOCK, b"x" * BLOCK)
    fill(store, range(3, 4), commit=False)
    fs.free_uncommitted_space(CacheDirectory(store.directory), VERSION.id)
    stored.commit_block(5, xxhash.xxh3_64_intdigest(b"x" * BLOCK))
    assert data_of(stored)[5 * BLOCK : 6 * BLOCK] == b"x" * BLOCK
    stored.close()
    other.close()


def test_the_scan_does_not_overwrite_what_happened_since_it_read_a_file() -> None:
    records = ObjectTable()
    old = ObjectRecord(VERSION, BLOCK, 0, BLOCK, False, 1)
    new = ObjectRecord(VERSION, BLOCK, BLOCK, 2 * BLOCK, False, 2)
    records.watch_object(VERSION.id)
    records.put_record(VERSION.id, new)
    records.put_if_unchanged(VERSION.id, old)
    assert records.get(VERSION.id) == new
    records.watch_object(VERSION.id)
    records.forget_object(VERSION.id)
    records.put_if_unchanged(VERSION.id, old)
    assert records.get(VERSION.id) is None
    records.watch_object(VERSION.id)
    records.put_if_unchanged(VERSION.id, old)
    assert records.get(VERSION.id) == old
