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

from fusecache.store import probe, tier_placement
from fusecache.store.memory import MemoryDirectory
from fusecache.store.store import Store
from fusecache.store.throughput import MEASUREMENT_LIFETIME, BusyThroughput, PeakThroughput
from fusecache.store.tier_placement import MeasuredRates, TierCandidate
from fusecache.store.tiers import ThroughputMeter, TieredStore
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
) -> TierCandidate:
    return TierCandidate(size, on_disk, in_memory, lambda: fits, lambda: elsewhere, lambda: resident)


def test_by_size_large_objects_go_to_memory_but_for_those_whole_on_the_disk() -> None:
    assert tier_placement.small_belongs_in_memory(found(), 99)
    assert not tier_placement.small_belongs_in_memory(found(), 100)
    assert not tier_placement.small_belongs_in_memory(found(on_disk=100), 99)
    assert tier_placement.small_belongs_in_memory(found(on_disk=50), 99)


@pytest.mark.parametrize(
    ("paces", "there", "memory"),
    [
        (MeasuredRates(), found(), False),  # nothing was measured
        (MeasuredRates(disk_write=100.0), found(), False),
        (MeasuredRates(network_peak=1000.0), found(), False),
        (MeasuredRates(disk_write=100.0, network_peak=140.0), found(), False),  # slower, not clearly
        (MeasuredRates(disk_write=100.0, network_peak=160.0), found(), True),
        (MeasuredRates(disk_write=100.0, network_peak=160.0), found(fits=False), False),
        (MeasuredRates(disk_write=100.0, network_peak=160.0), found(on_disk=40), False),  # where it was begun
        (MeasuredRates(disk_write=1000.0, network_peak=160.0), found(in_memory=40), True),
        (MeasuredRates(disk_write=1000.0, network_peak=160.0), found(on_disk=100, in_memory=40), False),
        (MeasuredRates(), found(on_disk=100, in_memory=100), True),
        (MeasuredRates(disk_read=100.0), found(on_disk=100), False),
        (MeasuredRates(), found(on_disk=100, elsewhere=900.0), False),
        (MeasuredRates(disk_read=100.0), found(on_disk=100, elsewhere=140.0), False),
        (MeasuredRates(disk_read=100.0), found(on_disk=100, elsewhere=160.0), True),
        (MeasuredRates(disk_read=100.0), found(on_disk=99, elsewhere=160.0), False),
        (MeasuredRates(disk_read=100.0), found(on_disk=100, elsewhere=160.0, resident=True), False),
        (MeasuredRates(disk_read=100.0), found(on_disk=100, elsewhere=160.0, fits=False), False),
    ],
)
def test_by_what_was_measured(paces: MeasuredRates, there: TierCandidate, memory: bool) -> None:
    assert tier_placement.auto_belongs_in_memory(there, paces) is memory


def test_the_best_second_counts_for_a_while() -> None:
    best = PeakThroughput()
    for tick in range(10):
        best.add_arrival(tick / 10, 100)
    fast = best.bytes_per_second(1.0)
    assert fast is not None
    assert fast > 900
    for tick in range(20, 100):
        best.add_arrival(tick / 10, 10)
    assert best.bytes_per_second(10.0) == fast
    slow = best.bytes_per_second(MEASUREMENT_LIFETIME + 2)
    assert slow is not None
    assert slow < 200


def test_calls_at_the_same_time_share_their_seconds() -> None:
    busy = BusyThroughput()
    assert busy.bytes_per_second(0) is None
    busy.begin_call(0.0)
    busy.begin_call(0.5)
    busy.end_call(1.0, 64 * MIB)
    busy.end_call(2.0, 64 * MIB)
    busy.begin_call(10.0)  # nothing was under way for 8 s
    busy.end_call(11.0, 64 * MIB)
    assert busy.bytes_per_second(11.0) == 64 * MIB
    assert busy.bytes_per_second(11.0 + MEASUREMENT_LIFETIME + 1) is None


@contextmanager
def tiers(folder: Path, meter: ThroughputMeter | None = None) -> Iterator[TieredStore]:
    options: dict[str, Any] = {"limit": LIMIT, "free_floor": 0, "block_size": BLOCK}
    with (
        Store(folder / "disk", **options) as disk,
        Store(folder / "memory", **options, is_in_memory=True) as memory,
    ):
        yield TieredStore(disk, memory, small_size=2 * BLOCK, meter=meter)


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


def settled(meter: ThroughputMeter, wanted: Callable[[MeasuredRates], bool]) -> MeasuredRates:
    until = time.monotonic() + 10
    while not wanted(meter.measured_rates()) and time.monotonic() < until:
        time.sleep(0.01)
    return meter.measured_rates()


def test_a_disk_that_is_slower_than_what_arrives_is_passed_over(tmp_path: Path) -> None:
    """The measurement is replaced; tests/integration/test_tier_placement.py has a disk that is slow."""
    meter = ThroughputMeter(tmp_path, 0, measure_rates=lambda _directory: (1000.0, 1000.0))
    with closing(meter), tiers(tmp_path, meter) as both:
        assert settled(meter, lambda now: now.disk_write is not None).disk_write == 1000.0
        first = both.open(version("first", 1))
        fill(first)
        first.close()
        assert list((tmp_path / "disk").rglob("*.data"))  # nothing is known of the network yet
        until = time.monotonic() + 10
        while meter.measured_rates().network_peak is None and time.monotonic() < until:
            with meter.observe_memory_write(1 << 20):
                time.sleep(0.01)
        second = both.open(version("second", 3))
        fill(second)
        second.close()
        assert [path.stat().st_size for path in (tmp_path / "memory").rglob("*.data")] == [3 * BLOCK]
        again = both.open(version("first", 1))
        assert again.is_complete  # where it was
        again.close()


def test_what_other_nodes_give_faster_than_the_disk_is_opened_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = False
    monkeypatch.setattr(probe, "is_in_page_cache", lambda _fd, _size: resident)
    meter = ThroughputMeter(tmp_path, 0, measure_rates=lambda _directory: (1000.0, 1000.0))
    whole = version("whole", 3)
    with closing(meter), tiers(tmp_path, meter) as both:
        assert both.measured_rates(wait_for_measurement=True).disk_read == 1000.0
        with closing(both.open(whole)) as stored:
            fill(stored)
            assert both.estimate_peer_throughput is None
        for pace, there in ((None, True), (1400.0, True), (1600.0, False)):
            both.estimate_peer_throughput = lambda _version, pace=pace: pace  # type: ignore[misc]
            with closing(both.open(whole)) as stored:
                assert stored.is_complete == there
        with both.open_in_place(whole), closing(both.open(whole)) as stored:
            assert stored.is_complete  # who is asked for it gives what it has
        resident = True
        with closing(both.open(whole)) as stored:
            assert stored.is_complete
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
        assert probe.is_in_page_cache(file.fileno(), MIB)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        gone = not probe.is_in_page_cache(file.fileno(), MIB)
        assert gone or _lives_in_memory(path)
    empty = tmp_path / "empty"
    empty.touch()
    with empty.open("rb") as file:
        assert probe.is_in_page_cache(file.fileno(), 0)


def _lives_in_memory(path: Path) -> bool:
    """Whether the file system has nothing but the page cache, or does not say (tmpfs, overlays of it)."""
    found = subprocess.run(["stat", "-f", "-c", "%T", str(path)], check=True, capture_output=True, text=True)
    return found.stdout.strip() in ("tmpfs", "ramfs", "overlayfs", "zfs", "fuseblk")


def test_a_real_disk_is_measured(tmp_path: Path) -> None:
    meter = ThroughputMeter(tmp_path, 0)
    meter.measured_rates()
    meter.wait_for_measurement()
    paces = meter.measured_rates()
    assert (paces.disk_write is None) == (paces.disk_read is None)  # None: a file system without O_DIRECT
    assert paces.disk_write is None or paces.disk_write > 0
    assert not list(tmp_path.iterdir())


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
