"""Disk or memory: the rules, and two stores that look like one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fusecache.store import tier_placement
from fusecache.store.memory import MemoryDirectory
from fusecache.store.store import Store
from fusecache.store.tier_placement import TierCandidate
from fusecache.store.tiers import TieredStore
from tests.unit.test_store import BLOCK, LIMIT, fill, version


def found(on_disk: int = 0, in_memory: int = 0, *, size: int = 100) -> TierCandidate:
    return TierCandidate(size, on_disk, in_memory)


def test_by_size_large_objects_go_to_memory_but_for_those_whole_on_the_disk() -> None:
    assert tier_placement.small_belongs_in_memory(found(), 99)
    assert not tier_placement.small_belongs_in_memory(found(), 100)
    assert not tier_placement.small_belongs_in_memory(found(on_disk=100), 99)
    assert tier_placement.small_belongs_in_memory(found(on_disk=50), 99)


@pytest.mark.parametrize(
    ("there", "memory"),
    [
        (found(), None),
        (found(on_disk=40), False),
        (found(in_memory=40), True),
        (found(on_disk=100, in_memory=40), False),
        (found(on_disk=100, in_memory=100), True),
    ],
)
def test_in_place_is_where_most_of_it_is(there: TierCandidate, memory: bool | None) -> None:
    assert tier_placement.is_mostly_in_memory(there) is memory


@contextmanager
def tiers(folder: Path) -> Iterator[TieredStore]:
    options: dict[str, Any] = {"limit": LIMIT, "free_floor": 0, "block_size": BLOCK}
    with (
        Store(folder / "disk", **options) as disk,
        Store(folder / "memory", **options, is_in_memory=True) as memory,
    ):
        yield TieredStore(disk, memory, small_size=2 * BLOCK)


def test_each_object_is_in_one_place(tmp_path: Path) -> None:
    small, large = version("small", 2), version("large", 3)
    with tiers(tmp_path) as both:
        for one in (small, large):
            stored = both.open(one)
            fill(stored)
            assert both.open(one) is stored
            stored.close()
            stored.close()
            assert both.has_whole(one)
        assert [path.stat().st_size for path in (tmp_path / "disk").rglob("*.data")] == [small.size]
        assert [path.stat().st_size for path in (tmp_path / "memory").rglob("*.data")] == [large.size]
        usage = both.usage()
        assert (usage.limit, usage.memory_limit, usage.objects_complete) == (2 * LIMIT, LIMIT, 2)
        assert usage.used > usage.memory_used > large.size
        assert usage.fullness == usage.memory_used / LIMIT > usage.used / usage.limit
        assert {info.version.key: info.is_in_memory for info in both.objects()} == {
            "small": False,
            "large": True,
        }
        assert both.version_of(large.id) == large
        both.set_pinned(large.id, True)
        both.set_pinned(large.id, False)
        assert both.evict(large.id) > 0
        assert both.evict(small.id) > 0
        assert not both.has_whole(small)
        assert both.usage().objects_complete == 0


def test_another_node_is_given_what_is_here_wherever_that_is(tmp_path: Path) -> None:
    large = version("large", 3)
    with (
        Store(tmp_path / "disk", limit=LIMIT, free_floor=0, block_size=BLOCK) as disk,
        closing(disk.open(large)) as begun,
    ):
        fill(begun, range(1))
    with tiers(tmp_path) as both:
        with both.open_in_place(large), closing(both.open(large)) as stored:
            assert stored.cached_bytes() == BLOCK
        with closing(both.open(large)) as stored:
            assert stored.cached_bytes() == 0  # it belongs in memory
            fill(stored)
        with both.open_in_place(large) as stored:
            assert stored.cached_bytes() == large.size
        assert len(both.objects()) == 1
        assert both.usage().objects_complete == 1
        assert both.evict(large.id) > large.size + BLOCK


def directory(base: Path, *, name: str = "/mnt", keep: bool = False) -> MemoryDirectory:
    return MemoryDirectory(
        base, runtime_dir=base / "run", mountpoint=Path(name), block_size=BLOCK, keep_objects=keep
    )


def test_a_directory_in_memory_is_one_mount_s_own(tmp_path: Path) -> None:
    first, other = directory(tmp_path), directory(tmp_path, name="/other")
    assert first.path != other.path
    assert first.path.stat().st_mode & 0o777 == 0o700
    (tmp_path / "fusecache-0123456789abcdef").mkdir(mode=0o700)  # of a mount that is gone
    (tmp_path / "fusecache-not-ours").mkdir()
    third = directory(tmp_path, name="/third")
    assert {path.name for path in tmp_path.iterdir()} == {
        first.path.name,
        other.path.name,
        third.path.name,
        "fusecache-not-ours",
    }
    for made in (first, other, third):
        made.remove_directory()
    assert [path.name for path in tmp_path.iterdir()] == ["fusecache-not-ours"]


def test_what_a_killed_daemon_left_in_memory_is_kept_if_it_can_be_used(tmp_path: Path) -> None:
    first = directory(tmp_path)
    Store(first.path, limit=LIMIT, free_floor=0, block_size=BLOCK).close()
    first.release_ownership()
    second = directory(tmp_path, keep=True)
    assert (second.path / "format").exists()
    second.release_ownership()
    third = directory(tmp_path)
    assert not list(third.path.iterdir())
    third.remove_directory()
