"""Disk or memory: the rules, and two stores that look like one."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fusecache.store import paths, probe
from fusecache.store.memory import MemoryDirectory
from fusecache.store.pace import LASTING, Best, Busy
from fusecache.store.paths import Found, Paces
from fusecache.store.store import Store
from fusecache.store.tiers import Meter, Tiers
from tests.unit.test_store import BLOCK, LIMIT, fill, version

MIB = 1 << 20


def found(
    on_disk: int = 0,
    in_memory: int = 0,
    *,
    size: int = 100,
    fits: bool = True,
    elsewhere: float | None = None,
    resident: bool = False,
) -> Found:
    return Found(size, on_disk, in_memory, lambda: fits, lambda: elsewhere, lambda: resident)


def test_by_size_large_objects_go_to_memory_but_for_those_whole_on_the_disk() -> None:
    assert paths.small_in_memory(found(), 99)
    assert not paths.small_in_memory(found(), 100)
    assert not paths.small_in_memory(found(on_disk=100), 99)
    assert paths.small_in_memory(found(on_disk=50), 99)


@pytest.mark.parametrize(
    ("paces", "there", "memory"),
    [
        (Paces(), found(), False),  # nothing was measured
        (Paces(write=100.0), found(), False),
        (Paces(arriving=1000.0), found(), False),
        (Paces(write=100.0, arriving=140.0), found(), False),  # slower, not clearly
        (Paces(write=100.0, arriving=160.0), found(), True),
        (Paces(write=100.0, arriving=160.0), found(fits=False), False),
        (Paces(write=100.0, arriving=160.0), found(on_disk=40), False),  # where it was begun
        (Paces(write=1000.0, arriving=160.0), found(in_memory=40), True),
        (Paces(write=1000.0, arriving=160.0), found(on_disk=100, in_memory=40), False),
        (Paces(), found(on_disk=100, in_memory=100), True),
        (Paces(read=100.0), found(on_disk=100), False),
        (Paces(), found(on_disk=100, elsewhere=900.0), False),
        (Paces(read=100.0), found(on_disk=100, elsewhere=140.0), False),
        (Paces(read=100.0), found(on_disk=100, elsewhere=160.0), True),
        (Paces(read=100.0), found(on_disk=99, elsewhere=160.0), False),
        (Paces(read=100.0), found(on_disk=100, elsewhere=160.0, resident=True), False),
        (Paces(read=100.0), found(on_disk=100, elsewhere=160.0, fits=False), False),
    ],
)
def test_by_what_was_measured(paces: Paces, there: Found, memory: bool) -> None:
    assert paths.auto_in_memory(there, paces) is memory


def test_the_best_second_counts_for_a_while() -> None:
    best = Best()
    for tick in range(10):
        best.add(tick / 10, 100)
    fast = best.per_second(1.0)
    assert fast is not None
    assert fast > 900
    for tick in range(20, 100):
        best.add(tick / 10, 10)
    assert best.per_second(10.0) == fast
    slow = best.per_second(LASTING + 2)
    assert slow is not None
    assert slow < 200


def test_calls_at_the_same_time_share_their_seconds() -> None:
    busy = Busy()
    assert busy.per_second(0) is None
    busy.begin(0.0)
    busy.begin(0.5)
    busy.end(1.0, 64 * MIB)
    busy.end(2.0, 64 * MIB)
    busy.begin(10.0)  # nothing was under way for 8 s
    busy.end(11.0, 64 * MIB)
    assert busy.per_second(11.0) == 64 * MIB
    assert busy.per_second(11.0 + LASTING + 1) is None


@contextmanager
def tiers(folder: Path, meter: Meter | None = None) -> Iterator[Tiers]:
    options: dict[str, Any] = {"limit": LIMIT, "free_floor": 0, "block_size": BLOCK}
    with (
        Store(folder / "disk", **options) as disk,
        Store(folder / "memory", **options, in_memory=True) as memory,
    ):
        yield Tiers(disk, memory, small_size=2 * BLOCK, meter=meter)


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
        assert {info.version.key: info.in_memory for info in both.objects()} == {
            "small": False,
            "large": True,
        }
        assert both.version_of(large.id) == large
        both.pin(large.id, True)
        both.pin(large.id, False)
        assert both.evict(large.id) > 0
        assert both.evict(small.id) > 0
        assert not both.has_whole(small)
        assert both.usage().objects_complete == 0


def settled(meter: Meter, wanted: Callable[[Paces], bool]) -> Paces:
    until = time.monotonic() + 10
    while not wanted(meter.paces()) and time.monotonic() < until:
        time.sleep(0.01)
    return meter.paces()


def test_a_disk_that_is_slower_than_what_arrives_is_passed_over(tmp_path: Path) -> None:
    """The measurement is replaced; tests/integration/test_paths.py has a disk that is slow."""
    meter = Meter(tmp_path, 0, measure=lambda _directory: (1000.0, 1000.0))
    with closing(meter), tiers(tmp_path, meter) as both:
        assert settled(meter, lambda now: now.write is not None).write == 1000.0
        first = both.open(version("first", 1))
        fill(first)
        first.close()
        assert list((tmp_path / "disk").rglob("*.data"))  # nothing is known of the network yet
        until = time.monotonic() + 10
        while meter.paces().arriving is None and time.monotonic() < until:
            with meter.to_memory(1 << 20):
                time.sleep(0.01)
        second = both.open(version("second", 3))
        fill(second)
        second.close()
        assert [path.stat().st_size for path in (tmp_path / "memory").rglob("*.data")] == [3 * BLOCK]
        again = both.open(version("first", 1))
        assert again.complete  # where it was
        again.close()


def test_what_other_nodes_give_faster_than_the_disk_is_opened_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = False
    monkeypatch.setattr(probe, "is_resident", lambda _fd, _size: resident)
    meter = Meter(tmp_path, 0, measure=lambda _directory: (1000.0, 1000.0))
    whole = version("whole", 3)
    with closing(meter), tiers(tmp_path, meter) as both:
        assert both.paces(wait=True).read == 1000.0
        with closing(both.open(whole)) as stored:
            fill(stored)
            assert both.elsewhere is None
        for pace, there in ((None, True), (1400.0, True), (1600.0, False)):
            both.elsewhere = lambda _version, pace=pace: pace  # type: ignore[misc]
            with closing(both.open(whole)) as stored:
                assert stored.complete == there
        with both.in_place(whole), closing(both.open(whole)) as stored:
            assert stored.complete  # who is asked for it gives what it has
        resident = True
        with closing(both.open(whole)) as stored:
            assert stored.complete
        resident = False
        with closing(both.open(whole)) as stored:
            fill(stored)
        assert len(both.objects()) == 1
        assert both.usage().objects_complete == 2
        assert both.evict(whole.id) > 2 * whole.size


def test_the_page_cache_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(MIB))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        assert probe.is_resident(file.fileno(), MIB)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        gone = not probe.is_resident(file.fileno(), MIB)
        assert gone or _lives_in_memory(path)
    empty = tmp_path / "empty"
    empty.touch()
    with empty.open("rb") as file:
        assert probe.is_resident(file.fileno(), 0)


def _lives_in_memory(path: Path) -> bool:
    """Whether the file system has nothing but the page cache, or does not say (tmpfs, overlays of it)."""
    found = subprocess.run(["stat", "-f", "-c", "%T", str(path)], check=True, capture_output=True, text=True)
    return found.stdout.strip() in ("tmpfs", "ramfs", "overlayfs", "zfs", "fuseblk")


def test_a_real_disk_is_measured(tmp_path: Path) -> None:
    meter = Meter(tmp_path, 0)
    meter.paces()
    meter.wait()
    paces = meter.paces()
    assert (paces.write is None) == (paces.read is None)  # None: a file system without O_DIRECT
    assert paces.write is None or paces.write > 0
    assert not list(tmp_path.iterdir())


def directory(base: Path, *, name: str = "/mnt", keep: bool = False) -> MemoryDirectory:
    return MemoryDirectory(base, runtime_dir=base / "run", mountpoint=Path(name), block_size=BLOCK, keep=keep)


def test_a_directory_in_memory_is_one_mount_s_own(tmp_path: Path) -> None:
    first, other = directory(tmp_path), directory(tmp_path, name="/other")
    assert first.path != other.path
    assert first.path.stat().st_mode & 0o777 == 0o700
    (tmp_path / "fusecache-0123456789abcdef").mkdir(mode=0o700)  # of a mount that is gone
    (tmp_path / "fusecache-not-ours").mkdir()
    third = directory(tmp_path, name="/third")
    assert {path.name for path in tmp_path.iterdir()} == {
        first.path.name, other.path.name, third.path.name, "fusecache-not-ours"
    }  # fmt: skip
    for made in (first, other, third):
        made.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["fusecache-not-ours"]


def test_what_a_killed_daemon_left_in_memory_is_kept_if_it_can_be_used(tmp_path: Path) -> None:
    first = directory(tmp_path)
    Store(first.path, limit=LIMIT, free_floor=0, block_size=BLOCK).close()
    first.close()
    second = directory(tmp_path, keep=True)
    assert (second.path / "format").exists()
    second.close()
    third = directory(tmp_path)
    assert not list(third.path.iterdir())
    third.remove()
