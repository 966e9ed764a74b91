"""Which file is fetched first, and how long that will take."""

from __future__ import annotations

import threading
from pathlib import Path

from fusecache.fetch.settings import FetchSettings
from fusecache.store.store import Store
from fusecache.throughput import Throughput
from fusecache.types import ObjectVersion
from tests.support.content import check
from tests.support.scripted import WAIT, ScriptedOrigin, Step, version
from tests.unit.test_fetch_service import BLOCK, RecordingCatalog, fetching


def test_files_that_are_waited_for_are_made_whole_one_after_the_other(tmp_path: Path) -> None:
    files = [version(f"{n}.bin", 8 * BLOCK) for n in range(3)]
    origin, catalog_view = ScriptedOrigin(files), RecordingCatalog(files)
    step = Step()
    origin.gate = step.hold_from(0)
    settings = FetchSettings(concurrency=2, range_bytes=2 * BLOCK)
    with (
        Store(tmp_path / "c", limit=1 << 30, free_floor=0, block_size=BLOCK) as store,
        fetching(store, origin, catalog_view, settings) as fetch_service,
    ):
        loads = [fetch_service.open_object(file, "") for file in files]
        for object_fetch in loads:
            fetch_service.fetch_whole_file(object_fetch)
        assert step.arrived()
        step.open()
        for file in files:
            catalog_view.wait(file.key)
        firsts = list(dict.fromkeys(key for key, _, _ in origin.reads))
        assert firsts == [file.key for file in files]
        for object_fetch in loads:
            assert fetch_service.seconds_until_complete(object_fetch) == float("inf")
            fetch_service.release_fetch(object_fetch)


def test_files_that_are_read_take_turns(tmp_path: Path) -> None:
    files = [version(f"{n}.dat", 64 * BLOCK) for n in range(2)]
    origin, catalog_view = ScriptedOrigin(files), RecordingCatalog(files)
    asked, reached = threading.Event(), threading.Event()

    def gate(found: ObjectVersion, offset: int) -> None:
        assert asked.wait(WAIT)
        if found.key == "1.dat" and offset >= 8 * BLOCK:
            reached.set()
        if found.key == "0.dat" and offset >= 32 * BLOCK:
            assert reached.wait(WAIT), "the second file had no turn before the first was done"

    origin.gate = gate
    settings = FetchSettings(concurrency=1, range_bytes=2 * BLOCK)
    with (
        Store(tmp_path / "c", limit=1 << 30, free_floor=0, block_size=BLOCK) as store,
        fetching(store, origin, catalog_view, settings) as fetch_service,
    ):
        loads = [fetch_service.open_object(file, "") for file in files]
        for object_fetch in loads:
            fetch_service.request_bytes(object_fetch, 0, 10, lambda _waiter: None)
        asked.set()
        for object_fetch, file in zip(loads, files, strict=True):
            check(fetch_service.read_bytes(object_fetch, 0, 10), file.key, "1")
        for file in files:
            catalog_view.wait(file.key)
        for object_fetch in loads:
            fetch_service.release_fetch(object_fetch)


def test_the_pace_is_that_of_the_last_second() -> None:
    pace = Throughput()
    assert pace.bytes_per_second(0.0) is None
    pace.add_arrival(10.0, 100)
    assert pace.bytes_per_second(10.05) is None
    for tick in range(1, 5):
        pace.add_arrival(10.0 + tick / 10, 100)
    assert pace.bytes_per_second(10.5) == 1000.0
    assert pace.bytes_per_second(11.45) is None
    assert pace.bytes_per_second(20.0) is None


def test_a_small_file_is_fetched_by_all_of_the_crew_unless_there_are_others(tmp_path: Path) -> None:
    block = 1 << 20
    files = [version(f"{n}.dat", 10 * block) for n in range(9)]
    origin, catalog_view = ScriptedOrigin(files), RecordingCatalog(files)
    settings = FetchSettings(concurrency=16, range_bytes=16 * block)
    with (
        Store(tmp_path / "c", limit=1 << 30, free_floor=0, block_size=block) as store,
        fetching(store, origin, catalog_view, settings) as fetch_service,
    ):
        alone = fetch_service.open_object(files[0], "")
        fetch_service.fetch_whole_file(alone)
        catalog_view.wait(files[0].key)
        fetch_service.release_fetch(alone)
        assert sorted(origin.reads) == [(files[0].key, n * 2 * block, 2 * block) for n in range(5)]
        origin.reads.clear()
        step = Step()
        origin.gate = step.hold_from(0)
        loads = [fetch_service.open_object(file, "") for file in files]
        for object_fetch in loads[1:]:
            fetch_service.fetch_whole_file(object_fetch)
        assert step.arrived()
        step.open()
        for file in files[1:]:
            catalog_view.wait(file.key)
        for object_fetch in loads:
            fetch_service.release_fetch(object_fetch)
        requests = {file.key: sum(key == file.key for key, _, _ in origin.reads) for file in files[1:]}
        assert min(requests.values()) < 5
