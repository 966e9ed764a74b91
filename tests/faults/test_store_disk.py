"""Full, failing, read-only and missing disks: a cache that fails is passed over, and never wrong."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from fusecache.errors import StoreError, StoreFullError
from fusecache.store import health
from fusecache.store.object import StoredObject
from fusecache.store.store import Store
from fusecache.types import ObjectVersion
from tests.faults.store_worker import content, version

MB = 1 << 20


@pytest.fixture
def store(small_disk: Path) -> Iterator[Store]:
    with Store(small_disk / "cache", limit=1 << 40, free_floor=0) as made:
        assert made.wait_for_scan(30)
        yield made


def fill(stored: StoredObject, blocks: range) -> None:
    for block in blocks:
        data = content(stored.version, block, MB)
        assert stored.reserve_bytes(len(data))
        stored.write(block * MB, data)
        stored.commit_block(block, xxhash.xxh3_64_intdigest(data))


def whole(stored: StoredObject) -> bool:
    return os.pread(stored.fileno(), stored.version.size, 0) == b"".join(
        content(stored.version, b, MB) for b in range(stored.block_count)
    )


def big(key: str, blocks: int) -> ObjectVersion:
    return version(key, blocks, MB)


def eat(disk: Path, leave: int) -> Path:
    """Somebody else's file, which leaves so many bytes free."""
    path = disk / "foreign"
    free = os.statvfs(disk)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - leave)
    return path


def test_a_full_disk_is_told_by_reserve_and_eviction_makes_room(store: Store) -> None:
    """The limit is larger than the disk: the disk itself is the limit."""
    for i in range(12):
        stored = store.open(big(f"k{i}", 8))
        fill(stored, range(8))
        assert whole(stored)
        stored.close()
    assert store.usage().evictions > 0
    assert not store.usage().sick
    too_big = store.open(big("huge", 100))
    assert not too_big.reserve_bytes(80 * MB)
    too_big.close()


def test_enospc_after_the_reservation_evicts_and_goes_on(store: Store, small_disk: Path) -> None:
    old = store.open(big("old", 16))
    fill(old, range(16))
    old.close()
    new = store.open(big("new", 4))
    assert new.reserve_bytes(4 * MB)
    eat(small_disk, 0)
    for block in range(4):
        data = content(new.version, block, MB)
        new.write(block * MB, data)  # the first meets ENOSPC
        new.commit_block(block, xxhash.xxh3_64_intdigest(data))
    assert whole(new)
    assert store.usage().evictions == 1
    assert not store.usage().sick
    new.close()


def test_enospc_with_nothing_to_evict_is_one_error_and_corrupts_nothing(
    store: Store, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = store.open(big("k", 8))
    fill(stored, range(3))
    assert stored.reserve_bytes(5 * MB)
    foreign = eat(small_disk, MB // 2)
    data = content(stored.version, 3, MB)
    with pytest.raises(StoreFullError, match="No space left"):
        stored.write(3 * MB, data)
    assert store.usage().sick
    assert not stored.reserve_bytes(MB)
    assert [stored.is_present(b) for b in range(8)] == [True] * 3 + [False] * 5
    assert os.pread(stored.fileno(), 3 * MB, 0) == b"".join(content(stored.version, b, MB) for b in range(3))
    stored.unreserve_bytes(5 * MB)
    foreign.unlink()
    monkeypatch.setattr(store._health, "_clock", lambda: 1e18)
    fill(stored, range(3, 8))
    assert whole(stored)
    assert not store.usage().sick
    stored.close()


def test_a_store_on_a_disk_that_is_full_from_the_start_stores_nothing(small_disk: Path) -> None:
    (small_disk / "cache").mkdir()
    eat(small_disk, 128 << 10)
    with Store(small_disk / "cache", limit=1 << 40, free_floor=0) as store:
        stored = store.open(big("k", 2))
        assert not stored.reserve_bytes(2 * MB)
        stored.close()


def test_no_room_for_the_store_itself_is_one_line(small_disk: Path) -> None:
    (small_disk / "cache").mkdir()
    eat(small_disk, 0)
    with pytest.raises(StoreError, match=r"cache can't be used: No space left on device: free") as caught:
        Store(small_disk / "cache", limit=1 << 40, free_floor=0)
    assert "\n" not in str(caught.value)


class Disk:
    """The system calls of the store's data path, failing while `error` is set."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error = 0
        self.calls = 0
        self._directory = f"{directory}/"
        for name in ("pwrite", "preadv", "open", "fdatasync"):
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name)))

    def _wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **kwargs: Any) -> Any:
            where = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
            if str(where).startswith(self._directory):
                self.calls += 1
                if self.error:
                    raise OSError(self.error, os.strerror(self.error))
            return real(target, *args, **kwargs)

        return call


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.ENODEV])
def test_a_sick_disk_is_bypassed_probed_and_readmitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    caplog.set_level(logging.INFO)
    disk = Disk(tmp_path, monkeypatch)
    now = [100.0]
    with Store(tmp_path, limit=64 * MB, free_floor=0) as store:
        assert store.wait_for_scan(30)
        store._health._clock = lambda: now[0]
        stored = store.open(big("k", 4))
        fill(stored, range(2))
        assert stored.reserve_bytes(2 * MB)
        disk.error = code
        with pytest.raises(StoreError, match=os.strerror(code)):
            stored.write(2 * MB, b"x" * MB)
        assert store.usage().sick
        assert "is bypassed" in caplog.text
        assert stored.is_present(0)  # and goes on being served

        calls = disk.calls
        assert not stored.reserve_bytes(MB)
        assert disk.calls == calls  # not touched before the next probe
        now[0] += health.PROBE_INTERVAL
        assert not stored.reserve_bytes(MB)
        assert disk.calls > calls

        disk.error = 0
        assert not stored.reserve_bytes(MB)  # a failed probe has to be PROBE_INTERVAL ago
        now[0] += health.PROBE_INTERVAL
        stored.unreserve_bytes(2 * MB)
        fill(stored, range(2, 4))
        assert whole(stored)
        assert not store.usage().sick
        assert "works again" in caplog.text
        stored.close()


def test_a_block_that_cannot_be_read_is_missing_and_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(tmp_path, limit=64 * MB, free_floor=0) as store:
        stored = store.open(big("k", 2))
        fill(stored, range(2))
        stored.close()
    with Store(tmp_path, limit=64 * MB, free_floor=0) as store:
        assert store.wait_for_scan(30)
        stored = store.open(big("k", 2))
        disk = Disk(tmp_path, monkeypatch)
        disk.error = errno.EIO
        assert not stored.verify_block(0)
        assert not stored.is_present(0)
        assert store.usage().sick
        disk.error = 0
        stored.close()


def test_a_commit_that_cannot_be_recorded_leaves_the_block_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(tmp_path, limit=64 * MB, free_floor=0) as store:
        assert store.wait_for_scan(30)
        stored = store.open(big("k", 2))
        fill(stored, range(1))
        assert stored.reserve_bytes(MB)
        data = content(stored.version, 1, MB)
        stored.write(MB, data)
        disk = Disk(tmp_path, monkeypatch)
        disk.error = errno.EIO
        with pytest.raises(StoreError):
            stored.commit_block(1, xxhash.xxh3_64_intdigest(data))
        assert not stored.is_present(1)
        assert not stored.is_complete
        disk.error = 0
        stored.close()


def test_a_missing_parent_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"its parent .* does not exist: mount the disk or run mkdir -p"):
        Store(tmp_path / "a" / "b", limit=MB, free_floor=0)


def test_a_file_in_its_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("x")
    with pytest.raises(StoreError, match="is not a directory: choose another cache_dir"):
        Store(tmp_path / "cache", limit=MB, free_floor=0)


def test_a_read_only_disk_is_one_line(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for directory in (small_disk, small_disk / "new"):
        with pytest.raises(StoreError, match="can't be used: Read-only file system") as caught:
            Store(directory, limit=MB, free_floor=0)
        assert "\n" not in str(caught.value)


def test_a_disk_that_turns_read_only_leaves_what_is_there_readable(small_disk: Path) -> None:
    with Store(small_disk / "cache", limit=64 * MB, free_floor=0) as store:
        stored = store.open(big("k", 4))
        fill(stored, range(3))
        stored.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreError):
        Store(small_disk / "cache", limit=64 * MB, free_floor=0)


def test_a_directory_that_is_removed_while_in_use_is_passed_over(tmp_path: Path) -> None:
    with Store(tmp_path / "cache", limit=64 * MB, free_floor=0) as store:
        assert store.wait_for_scan(30)
        stored = store.open(big("k", 2))
        fill(stored, range(2))
        shutil.rmtree(tmp_path / "cache")
        assert whole(stored)  # open files stay
        other = store.open(big("other", 2))
        assert not other.reserve_bytes(MB)
        other.close()
        stored.close()
