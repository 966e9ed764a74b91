"""The store as the fetch service uses it: one process, a healthy disk."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from fusecache.errors import ConfigError, StoreError
from fusecache.store.attestation import AttestationPolicy
from fusecache.store.disk import files as fs
from fusecache.store.disk import format
from fusecache.store.disk.directory import CacheDirectory
from fusecache.store.object import StoredObject
from fusecache.store.object_writer import ObjectWriter
from fusecache.store.space import Space
from fusecache.store.store import Store
from fusecache.types import ObjectVersion

BLOCK = 4096
LIMIT = 100 * BLOCK
OVERHEAD = 4096  # the .blocks file of a small object


def version(key: str = "k", blocks: int = 4, tail: int = 0, etag: str = "e") -> ObjectVersion:
    return ObjectVersion("mem://b", key, etag, blocks * BLOCK + tail, 1)


def content(v: ObjectVersion) -> bytes:
    return random.Random(v.id).randbytes(v.size)


def fill(stored: StoredObject, blocks: Iterator[int] | range | None = None) -> None:
    data = content(stored.version)
    for block in blocks if blocks is not None else range(stored.block_count):
        part = data[block * BLOCK : (block + 1) * BLOCK]
        assert stored.reserve_bytes(len(part))
        stored.write(block * BLOCK, part)
        stored.commit_block(block, xxhash.xxh3_64_intdigest(part))


def data_of(stored: StoredObject) -> bytes:
    """All bytes of the data file."""
    return os.pread(stored.fileno(), stored.version.size, 0)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Any]:
    stores: list[Store] = []

    def build(**changes: Any) -> Store:
        options: dict[str, Any] = {"limit": LIMIT, "free_floor": 0, "block_size": BLOCK, **changes}
        store = Store(tmp_path / "cache", **options)
        stores.append(store)
        return store

    yield build
    for store in stores:
        store.close()


@pytest.fixture
def store(make: Any) -> Store:
    made: Store = make()
    return made


def test_a_block_is_present_once_it_is_committed(store: Store) -> None:
    stored = store.open(version(blocks=3, tail=100))
    assert stored.block_count == 4
    assert not stored.is_complete
    with pytest.raises(StoreError):
        stored.fileno()
    fill(stored, range(1, 2))
    assert [stored.is_present(b) for b in range(4)] == [False, True, False, False]
    assert stored.is_range_servable(BLOCK, BLOCK)
    assert stored.is_range_servable(BLOCK + 7, 0)
    assert not stored.is_range_servable(BLOCK - 1, 2)
    assert not stored.is_range_servable(BLOCK, BLOCK + 1)
    assert stored.cached_bytes() == BLOCK
    fill(stored, range(1))
    fill(stored, range(2, 4))
    assert stored.is_complete
    assert stored.is_range_servable(0, 1 << 40)
    assert stored.cached_bytes() == stored.version.size
    assert data_of(stored) == content(stored.version)
    stored.close()


def test_an_empty_object_is_complete_and_takes_nothing(store: Store) -> None:
    stored = store.open(version(blocks=0))
    assert stored.is_complete
    assert stored.is_range_servable(0, 10)
    with pytest.raises(StoreError):
        stored.fileno()
    stored.close()
    assert store.usage().used == 0


def test_the_data_file_has_the_size_of_the_object_from_the_start(store: Store) -> None:
    stored = store.open(version(blocks=9, tail=5))
    fill(stored, range(3, 4))
    assert os.fstat(stored.fileno()).st_size == 9 * BLOCK + 5
    assert os.fstat(stored.fileno()).st_blocks * 512 < 9 * BLOCK
    stored.close()


def test_fileno_is_read_only_and_carries_the_lock_past_the_close(store: Store) -> None:
    stored = store.open(version())
    fill(stored)
    flags = fcntl.fcntl(stored.fileno(), fcntl.F_GETFL)
    assert flags & os.O_ACCMODE == os.O_RDONLY
    backing = os.dup(stored.fileno())  # as the kernel's passthrough does
    stored.close()
    with pytest.raises(StoreError, match="in use"):
        store.evict(stored.version.id)
    os.close(backing)
    assert store.evict(stored.version.id) > 0


def test_one_object_per_version_and_process(store: Store) -> None:
    first, second = store.open(version()), store.open(version())
    assert first is second
    fill(first)
    first.close()
    assert second.is_complete
    assert data_of(second) == content(second.version)
    assert [info.open_count for info in store.objects()] == [1]
    second.close()
    assert [info.open_count for info in store.objects()] == [0]


def test_versions_of_one_key_are_two_objects(store: Store) -> None:
    old, new = store.open(version(etag="1")), store.open(version(etag="2"))
    fill(old)
    assert not new.is_present(0)
    old.close()
    new.close()


def test_reopening_in_the_same_process_hashes_nothing_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = store.open(version())
    fill(stored, range(3))
    stored.close()
    monkeypatch.setattr(StoredObject, "verify_block", lambda *_: pytest.fail("hashed again"))
    again = store.open(version())
    assert again is not stored
    assert [again.is_present(b) for b in range(4)] == [True, True, True, False]
    again.close()


def test_what_is_whole_is_known_without_opening_it(make: Any) -> None:
    store, other = make(), make()
    whole, part = version("whole"), version("part")
    assert not store.has_whole(whole)
    for each, blocks in ((whole, range(4)), (part, range(3))):
        stored = store.open(each)
        fill(stored, blocks)
        assert store.has_whole(each) is (each is whole)
        stored.close()
        assert store.has_whole(each) is (each is whole)
    assert not other.has_whole(whole)  # it verified nothing of it
    other.evict(whole.id)
    assert not store.has_whole(whole)


def test_of_an_unattested_object_that_is_closed_nothing_is_known(make: Any) -> None:
    store = make(attestation_policy=AttestationPolicy(bytes(16), lambda _version: False))
    stored = store.open(version())
    fill(stored)
    assert not store.has_whole(version())
    stored.attestation.mark_attested(bytes(32))
    assert store.has_whole(version())
    stored.close()
    assert not store.has_whole(version())


def test_an_open_while_the_last_close_is_under_way_knows_what_was_verified(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    v = version()
    stored = store.open(v)
    fill(stored)
    seen: list[bool] = []
    release = ObjectWriter.close

    def slow(self: ObjectWriter) -> None:
        if not seen:
            other = store.open(v)
            assert other is not stored
            seen.append(other.is_complete)
            other.close()
        release(self)

    monkeypatch.setattr(ObjectWriter, "close", slow)
    stored.close()
    assert seen == [True]
    again = store.open(v)
    assert again.is_complete
    again.close()


@pytest.mark.parametrize("mode", ["start", "always"])
def test_after_a_restart_every_block_is_verified_before_use(make: Any, mode: str) -> None:
    first = make(verify=mode)
    stored = first.open(version())
    fill(stored, range(3))
    stored.close()
    first.close()
    again = make(verify=mode).open(version())
    assert not again.is_complete
    assert not again.is_range_servable(0, 1)
    assert [again.is_present(b) for b in range(4)] == [False] * 4
    assert [again.is_unverified(b) for b in range(4)] == [True, True, True, False]
    assert [again.verify_block(b) for b in range(4)] == [True, True, True, False]
    assert [again.is_present(b) for b in range(4)] == [True, True, True, False]
    fill(again, range(3, 4))
    assert again.is_complete
    again.close()


def test_boot_mode_trusts_a_clean_stop_of_the_same_boot_only(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(verify="boot")
    stored = first.open(version())
    fill(stored)
    unclean = first.open(version("unclean"))
    fill(unclean)
    stored.close()
    first.close()  # `unclean` is still open

    second = make(verify="boot")
    again = second.open(version())
    assert again.is_complete
    again.close()
    other = second.open(version("unclean"))
    assert not other.is_present(0)
    assert other.is_unverified(0)
    other.close()
    second.close()
    unclean.close()

    monkeypatch.setattr("fusecache.store.store.read_boot_id", lambda: bytes(16))
    rebooted = make(verify="boot").open(version())
    assert not rebooted.is_present(0)
    assert rebooted.verify_block(0)
    rebooted.close()


def test_a_flipped_bit_is_found_and_only_its_block_is_fetched_again(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first = make()
    stored = first.open(version())
    fill(stored)
    stored.close()
    first.close()
    path = CacheDirectory(first.directory).data_path(stored.version.id)
    flip(path, BLOCK + 17)
    inode = path.stat().st_ino

    second = make()
    again = second.open(version())
    assert [again.verify_block(b) for b in range(4)] == [True, False, True, True]
    assert not again.is_unverified(1)
    assert second.usage().corrupt_blocks == 1
    assert "block 1 in the cache is damaged" in caplog.text
    fill(again, range(1, 2))
    assert again.is_complete
    assert path.stat().st_ino == inode
    assert data_of(again) == content(again.version)
    again.close()
    assert second.usage().used == 4 * BLOCK + OVERHEAD


def test_a_bad_block_of_a_file_that_another_process_serves_is_not_rewritten(make: Any) -> None:
    first, second = (
        make(),
        make(),
    )  # two stores on one directory are as good as two processes: locks are per open
    mine = first.open(version())
    fill(mine)
    path = CacheDirectory(first.directory).data_path(mine.version.id)
    theirs = second.open(version())
    assert theirs.verify_block(0)
    flip(path, BLOCK + 17)
    before = path.read_bytes()
    assert not theirs.verify_block(1)
    assert not path.exists()
    assert data_of(mine) == before
    assert theirs.is_present(0)
    assert not theirs.is_unverified(1)
    assert not theirs.reserve_bytes(1)
    with pytest.raises(StoreError):
        theirs.write(0, b"x")
    fresh = second.open(version())
    assert fresh is not theirs
    fill(fresh)
    assert fresh.is_complete
    for stored in (mine, theirs, fresh):
        stored.close()
    assert second.open(version()).is_complete
    assert second.usage().used == 4 * BLOCK + OVERHEAD


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes((byte ^ 1,)))


def test_always_mode_finds_what_went_bad_after_it_was_verified(make: Any) -> None:
    store = make(verify="always")
    stored = store.open(version())
    fill(stored)
    flip(CacheDirectory(store.directory).data_path(stored.version.id), 3 * BLOCK)
    assert [stored.verify_block(b) for b in range(4)] == [True, True, True, False]
    assert not stored.is_complete
    assert not stored.is_present(3)
    stored.close()


def test_blocks_of_another_process_show_up_as_unverified(make: Any) -> None:
    first, second = make(), make()
    mine, theirs = first.open(version()), second.open(version())
    fill(mine, range(2))
    assert not theirs.is_unverified(0)  # it has no files open yet
    with theirs.claim_blocks(range(4)) as blocks:
        assert blocks == range(4)
    assert [theirs.is_unverified(b) for b in range(4)] == [True, True, False, False]
    fill(mine, range(2, 4))
    assert [theirs.is_unverified(b) for b in range(4)] == [True] * 4
    assert all(theirs.verify_block(b) for b in range(4))
    assert theirs.is_complete
    mine.close()
    theirs.close()


def test_a_claim_is_the_longest_prefix_that_nobody_has(make: Any) -> None:
    first, second = make(), make()
    mine, theirs = first.open(version(blocks=20)), second.open(version(blocks=20))
    claim = mine.claim_blocks(range(8, 12))
    assert claim.blocks == range(8, 12)
    assert theirs.claim_blocks(range(8, 20)).blocks == range(8, 8)
    other = theirs.claim_blocks(range(4, 20))
    assert other.blocks == range(4, 8)
    later = theirs.claim_blocks(range(12, 20))
    assert later.blocks == range(12, 20)
    claim.release()
    claim.release()
    assert theirs.claim_blocks(range(8, 20)).blocks == range(8, 20)
    mine.close()
    theirs.close()


def test_the_limit_holds_and_the_oldest_goes(store: Store) -> None:
    for i in range(12):
        stored = store.open(version(f"k{i}", blocks=9))
        fill(stored)
        stored.close()
        assert store.usage().used <= LIMIT
    keys = {info.version.key for info in store.objects()}
    assert keys == {f"k{i}" for i in range(2, 12)}
    assert store.usage().evictions == 2
    assert disk_usage(store) == store.usage().used


def test_what_is_elsewhere_too_goes_first(make: Any) -> None:
    spare = {version(f"k{i}", blocks=9) for i in (4, 7)}
    store: Store = make(is_spare=spare.__contains__)
    for i in range(12):
        stored = store.open(version(f"k{i}", blocks=9))
        fill(stored)
        stored.close()
    keys = {info.version.key for info in store.objects()}
    assert keys == {f"k{i}" for i in range(12)} - {"k4", "k7"}


def disk_usage(store: Store) -> int:
    data = CacheDirectory(store.directory).data_root
    return sum(path.stat().st_blocks * 512 for path in data.rglob("*") if path.is_file())


def test_pinned_and_open_objects_are_never_evicted(store: Store) -> None:
    pinned, opened = store.open(version("pinned", blocks=40)), store.open(version("open", blocks=40))
    fill(pinned)
    pinned.close()
    store.set_pinned(pinned.version.id, True)
    fill(opened)
    third = store.open(version("third", blocks=40))
    assert not third.reserve_bytes(40 * BLOCK)
    with pytest.raises(StoreError, match="pinned"):
        store.evict(pinned.version.id)
    with pytest.raises(StoreError, match="in use"):
        store.evict(opened.version.id)
    opened.close()
    assert third.reserve_bytes(40 * BLOCK)
    store.set_pinned(pinned.version.id, False)
    assert store.evict(pinned.version.id) == 40 * BLOCK + OVERHEAD
    assert store.evict(pinned.version.id) == 0
    with pytest.raises(StoreError, match="not in the cache"):
        store.set_pinned(pinned.version.id, True)
    third.close()


def test_pins_outlive_the_process_and_the_index(make: Any) -> None:
    first = make()
    stored = first.open(version())
    fill(stored)
    stored.close()
    first.set_pinned(stored.version.id, True)
    first.close()
    for path in (first.directory / "index").iterdir():
        path.unlink()
    second = make()
    assert second.wait_for_scan(30)
    assert [(i.version, i.is_pinned, i.is_complete) for i in second.objects()] == [
        (stored.version, True, True)
    ]


def test_nothing_is_evicted_for_what_can_never_fit(store: Store) -> None:
    stored = store.open(version())
    fill(stored)
    stored.close()
    big = store.open(version("big", blocks=1000))
    assert not big.reserve_bytes(1000 * BLOCK)
    big.close()
    assert store.usage().evictions == 0


def test_reservations_end_with_the_object(store: Store) -> None:
    stored = store.open(version())
    assert stored.reserve_bytes(10 * BLOCK)
    stored.unreserve_bytes(3 * BLOCK)
    assert store.usage().used == 7 * BLOCK + OVERHEAD
    stored.close()
    assert store.usage().used == OVERHEAD


def test_the_free_floor_holds(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(free_floor=10 * BLOCK)
    monkeypatch.setattr("fusecache.store.space.Space.free_bytes", lambda _: 20 * BLOCK)
    stored = store.open(version(blocks=30))
    assert stored.reserve_bytes(10 * BLOCK)
    assert not stored.reserve_bytes(1)
    stored.close()


def test_a_mapping_outlives_the_close(store: Store) -> None:
    stored = store.open(version())
    fill(stored)
    with mmap.mmap(stored.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        stored.close()
        assert mapping[10:20] == content(stored.version)[10:20]
        with pytest.raises(StoreError):
            store.evict(stored.version.id)  # the mapping holds the file, and so its lock


def test_a_complete_file_is_never_rewritten(store: Store) -> None:
    stored = store.open(version())
    fill(stored)
    stored.write(0, b"wrong")
    assert data_of(stored) == content(stored.version)
    stored.close()


def test_a_second_session_counts_as_a_use_and_the_first_does_not(store: Store) -> None:
    for expected in (0, 1, 2):
        stored = store.open(version())
        stored.count_access()
        stored.count_access()
        if not stored.is_complete:
            fill(stored)
        stored.count_access()
        stored.close()
        assert store._object_table.eviction_place(stored.version.id)[0] == expected


def test_the_order_of_eviction_outlives_a_restart(make: Any) -> None:
    first = make()
    for i in range(5):
        stored = first.open(version(f"k{i}", blocks=9))
        fill(stored)
        stored.close()
    hot = first.open(version("k0", blocks=9))
    hot.count_access()
    hot.close()
    first.close()
    second = make(limit=5 * (9 * BLOCK + OVERHEAD))
    assert second.wait_for_scan(30)
    stored = second.open(version("new", blocks=9))
    fill(stored)
    stored.close()
    assert {i.version.key for i in second.objects()} == {"k0", "k2", "k3", "k4", "new"}


def test_threads_fill_one_object_together(store: Store) -> None:
    stored = store.open(version(blocks=64))
    threads = [threading.Thread(target=fill, args=(stored, range(i, 64, 8))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stored.is_complete
    assert data_of(stored) == content(stored.version)
    stored.close()
    assert store.usage().used == 64 * BLOCK + OVERHEAD


def test_start_opens_no_object_and_waits_for_nothing(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 objects of 1,000 blocks: the constructor looks at none of them, the scan at no data file."""
    first = make(limit=1 << 50)
    first.close()
    versions = [version(f"shard{i}", blocks=1000) for i in range(1000)]
    cache_directory = CacheDirectory(first.directory)
    boot = bytes(16)
    for v in versions:
        path = cache_directory.data_path(v.id)
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.truncate(v.size)
        header = format.BlocksFileHeader(BLOCK, v.size, 1, format.pack_identity(v))
        packed = bytearray(format.pack_blocks_file(header, format.BlocksFileState(boot)))
        packed[format.HEADER_SIZE : format.checksum_offset(1000)] = format.pack_checksum(7) * 1000
        cache_directory.blocks_path(v.id).write_bytes(packed)
    cache_directory.close()

    opened: list[tuple[str, bool]] = []
    real_open, gate, main = os.open, threading.Event(), threading.current_thread()

    def spy(path: Any, *args: Any, **kwargs: Any) -> int:
        if threading.current_thread() is not main:
            gate.wait(60)
        opened.append((os.fspath(path), threading.current_thread() is main))
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", spy)
    monkeypatch.setattr("fusecache.store.object._hash_range", lambda *_: pytest.fail("hashed at the start"))
    store = make(limit=1 << 50)
    at_start = [path for path, _ in opened]
    assert len(at_start) < 10
    assert not any("/data/" in path for path in at_start)
    stored = store.open(versions[0])  # usable at once, with the scan held back
    assert stored.is_unverified(999)
    stored.close()
    gate.set()
    assert store.wait_for_scan(60)
    assert not any(path.endswith(".data") for path, in_main in opened if not in_main)
    assert len(store.objects()) == 1000
    assert store.usage().objects_complete == 1000
    # 128 bytes of header, 8,000 of checksums and the identity: two pages of .blocks each
    assert store.usage().used == sum(v.size for v in versions) + 1000 * 2 * 4096


def test_the_scan_drops_what_has_no_file_and_removes_what_is_half(make: Any) -> None:
    first = make()
    for key in ("gone", "half", "torn", "kept"):
        stored = first.open(version(key))
        fill(stored)
        stored.close()
    first.close()
    cache_directory = CacheDirectory(first.directory)
    for path in (cache_directory.data_path, cache_directory.blocks_path):
        path(version("gone").id).unlink()
    cache_directory.blocks_path(version("half").id).unlink()
    os.truncate(cache_directory.blocks_path(version("torn").id), 50)
    cache_directory.blocks_path(version("kept").id).with_suffix(".new").write_bytes(b"x")
    second = make()
    assert second.wait_for_scan(30)
    assert [i.version.key for i in second.objects()] == ["kept"]
    assert {path.name for path in cache_directory.data_root.rglob("*") if path.is_file()} == {
        f"{version('kept').id}.data",
        f"{version('kept').id}.blocks",
    }
    assert second.usage().used == 4 * BLOCK + OVERHEAD
    cache_directory.close()


def test_a_lost_ledger_is_recounted_before_anything_is_stored(make: Any) -> None:
    first = make()
    stored = first.open(version(blocks=90))
    fill(stored)
    stored.close()
    first.close()
    (first.directory / "ledger").unlink()
    second = make()
    fresh = second.open(version("new", blocks=20))
    assert fresh.reserve_bytes(20 * BLOCK)
    assert second.usage().used <= LIMIT
    assert second.usage().evictions == 1
    fresh.close()


def test_a_data_file_of_a_wrong_size_is_replaced(make: Any) -> None:
    first = make()
    stored = first.open(version())
    fill(stored)
    stored.close()
    first.close()
    cache_directory = CacheDirectory(first.directory)
    os.truncate(cache_directory.data_path(stored.version.id), 5)
    cache_directory.close()
    again = make().open(version())
    assert not again.is_unverified(0)
    fill(again)
    assert data_of(again) == content(again.version)
    again.close()


def test_eviction_by_another_process_between_two_opens(make: Any) -> None:
    first, second = make(), make()
    mine = first.open(version())
    fill(mine)
    mine.close()
    assert second.evict(version().id) > 0
    again = first.open(version())
    assert not again.is_present(0)
    fill(again)
    assert again.is_complete
    again.close()
    assert first.usage().used == 4 * BLOCK + OVERHEAD


def test_an_object_that_was_unlinked_between_open_and_lock_is_not_attached_to(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = store.open(version())
    fill(stored)
    stored.close()
    cache_directory = CacheDirectory(store.directory)
    real = fs.locks.try_flock

    def evicted_first(fd: int, *, exclusive: bool) -> bool:
        monkeypatch.setattr(fs.locks, "try_flock", real)
        with cache_directory.exclusive_lock():
            fs.unlink_object(cache_directory, stored.version.id)
        return real(fd, exclusive=exclusive)

    monkeypatch.setattr(fs.locks, "try_flock", evicted_first)
    again = store.open(version())
    assert not again.is_present(0)
    fill(again)
    assert CacheDirectory(store.directory).data_path(stored.version.id).exists()
    assert os.fstat(again.fileno()).st_nlink == 1
    again.close()
    cache_directory.close()


def test_misuse_is_told_in_one_line(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cache_size"):
        make(limit=0)
    make()
    with pytest.raises(ConfigError, match=r"block_size=4096"):
        make(block_size=8192)
    for other in (2, 99):
        (tmp_path / "cache" / "format").write_text(f"fusecache store {other}\nblock_size {BLOCK}\n")
        with pytest.raises(StoreError, match="another version of fusecache"):
            make()


def test_a_closed_store_opens_nothing(make: Any) -> None:
    store = make()
    stored = store.open(version())
    fill(stored)
    store.close()
    store.close()
    assert data_of(stored) == content(stored.version)
    assert not stored.reserve_bytes(1)
    stored.close()
    with pytest.raises(StoreError):
        store.open(version())


def test_a_lowered_limit_is_kept_soon_after_the_start(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make()
    for i in range(5):
        stored = first.open(version(f"k{i}", blocks=9))
        fill(stored)
        stored.close()
    first.close()
    kept = threading.Event()
    real = Space.enforce_limits

    def keep(space: Space) -> None:
        real(space)
        kept.set()

    monkeypatch.setattr(Space, "enforce_limits", keep)
    second = make(limit=3 * (9 * BLOCK + OVERHEAD))
    assert kept.wait(30)
    assert second.usage().used == 3 * (9 * BLOCK + OVERHEAD)
    assert disk_usage(second) == second.usage().used
    assert {i.version.key for i in second.objects()} == {"k2", "k3", "k4"}


def test_others_that_fill_the_disk_make_objects_go_as_far_as_they_can(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("a", "b", "open"):
        stored = store.open(version(key, blocks=9))
        fill(stored)
        if key != "open":
            stored.close()
    free = [9 * BLOCK]
    store._space.free_floor = 10 * BLOCK
    monkeypatch.setattr(Space, "free_bytes", lambda _: free[0])
    store._space.enforce_limits()
    assert {i.version.key for i in store.objects()} == {"b", "open"}
    free[0] = 0
    store._space.free_floor = 1000 * BLOCK
    store._space.enforce_limits()
    assert {i.version.key for i in store.objects()} == {"open"}
    stored.close()


def test_a_look_at_a_changed_directory_reads_only_what_is_not_known_to_be_complete(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, half = version("whole"), version("half")
    for made, blocks in ((whole, None), (half, range(1))):
        stored = store.open(made)
        fill(stored, blocks)
        stored.close()
    assert store.wait_for_scan(30)
    read: list[str] = []
    real = fs.read_summary
    monkeypatch.setattr(
        fs, "read_summary", lambda cache_directory, name: (read.append(name), real(cache_directory, name))[1]
    )
    store._folder_scan._folder_mtimes.clear()
    store._folder_scan.scan_folders()
    assert half.id in read
    assert whole.id not in read
    store._folder_scan.scan_folders(everything=True)
    assert whole.id in read


def test_whether_enough_can_be_evicted_is_known_without_looking_at_everything(store: Store) -> None:
    for number in range(20):
        stored = store.open(version(f"v{number}"))
        fill(stored)
        stored.close()
    asked: list[object] = []
    assert store._object_table.can_free(2 * BLOCK, lambda name: not asked.append(name))
    assert len(asked) == 1
    assert not store._object_table.can_free(1 << 40, lambda name: True)
