"""The states of a block, and the locks that their changes need."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fusecache.locking import OwnedLock
from fusecache.store.block_map import BlockMap
from fusecache.store.disk import files as fs
from fusecache.store.disk.directory import CacheDirectory, prepare_directory
from fusecache.store.store import Store
from tests.unit.test_store import BLOCK, LIMIT, fill, version


def states(blocks: BlockMap) -> list[str]:
    return [
        "present" if blocks.verified[block] else "unverified" if blocks.is_unverified(block) else "absent"
        for block in range(blocks.block_count)
    ]


def test_blocks_walk_through_their_states() -> None:
    lock = OwnedLock()
    blocks = BlockMap(3 * BLOCK, BLOCK, lock)
    assert states(blocks) == ["absent"] * 3
    checksums = memoryview(bytearray(24)).cast("Q")
    checksums[1] = checksums[2] = 7
    with lock:
        blocks.adopt_locked(checksums, b"\0\1\0")
        assert states(blocks) == ["absent", "present", "unverified"]
        assert blocks.missing_block_count == 2
        blocks.mark_present_locked(2)
        checksums[0] = 9
        blocks.mark_present_locked(0)
        blocks.mark_present_locked(0)
        assert blocks.is_complete
        assert [blocks.checksum(block) for block in range(3)] == [9, 7, 7]
        blocks.mark_bad_locked(1)
        assert (blocks.is_complete, blocks.bad_block_count, blocks.missing_block_count) == (False, 1, 1)
        assert states(blocks) == ["present", "unverified", "present"]  # until its checksum is cleared
        blocks.reject_locked(1)
        assert states(blocks) == ["present", "absent", "present"]
        blocks.detach_locked()
    assert not blocks.is_unverified(1)
    assert blocks.checksum(1) == 0


def test_a_change_without_the_object_s_lock_is_found() -> None:
    blocks = BlockMap(BLOCK, BLOCK, OwnedLock())
    with pytest.raises(AssertionError, match="does not hold the lock"):
        blocks.mark_present_locked(0)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[CacheDirectory]:
    with closing(prepare_directory(tmp_path / "cache", BLOCK)) as made:
        yield made


def test_unlinking_without_the_directory_s_lock_is_found(directory: CacheDirectory) -> None:
    with pytest.raises(AssertionError, match="does not hold the lock"):
        fs.unlink_object(directory, version().id)
    with directory.exclusive_lock() as is_locked:
        assert is_locked
        fs.unlink_object(directory, version().id)


def test_objects_of_one_store_share_no_lock(tmp_path: Path) -> None:
    """A thread that is held up in one object holds up none that fills another one."""
    with Store(tmp_path / "cache", limit=LIMIT, free_floor=0, block_size=BLOCK) as store:
        first, second = store.open(version("first")), store.open(version("second"))
        fill(first, range(1))
        with first.files.lock:
            worker = threading.Thread(target=fill, args=(second,), daemon=True)
            worker.start()
            worker.join(30)
            assert second.is_complete
        first.close()
        second.close()
