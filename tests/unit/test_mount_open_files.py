"""Opens with passthrough: what the channel's threads ask of the open files, with a store on the disk and no kernel."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fusecache.catalog.entry import Entry
from fusecache.errors import StoreError
from fusecache.events import EventHub
from fusecache.store.store import Store
from fusecache.types import NodeId, ObjectVersion
from fusecache_mount.device.backings import PassthroughState
from fusecache_mount.device.trace_switch import TraceSwitch
from fusecache_mount.fs import open_files
from fusecache_mount.fs.background_jobs import BackgroundJobs
from fusecache_mount.fs.journal import OpenFileJournal
from fusecache_mount.fs.mounted_files import build_mounted_files
from fusecache_mount.fs.stale_retries import STALE_RETRY_SECONDS
from fusecache_mount.kernel.nodeids import passthrough_nodeid
from tests.unit.test_store import BLOCK, LIMIT, fill, version

NODEID = NodeId(4711)
PASSTHROUGH = passthrough_nodeid(NODEID)


class Kernel:
    """Backings without a kernel."""

    def __init__(self) -> None:
        self.opened = 0
        self.open_backings: set[int] = set()
        self.error: OSError | None = None

    def open_backing(self, fd: int) -> int:
        self.opened += 1
        if self.error is not None:
            raise self.error
        self.open_backings.add(self.opened)
        return self.opened

    def close_backing(self, backing_id: int) -> None:
        self.open_backings.remove(backing_id)


class Told:
    """An observer of reads that remembers which opens it was told of."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def file_opened(self, version: ObjectVersion, *, is_passthrough: bool) -> bool:
        self.heard.append(f"opened {'with passthrough' if is_passthrough else 'through the daemon'}")
        return True

    def whole_file_wanted(self, version: ObjectVersion, source: str) -> None:
        self.heard.append("wanted whole")

    def file_closed(self, version: ObjectVersion) -> None:
        self.heard.append("closed")


class Bench:
    def __init__(self, directory: Path, *, blocks: int = 4, inspector: object = None) -> None:
        self.version = version("model.safetensors")
        self.store = Store(directory / "cache", limit=LIMIT, free_floor=0, block_size=BLOCK)
        stored = self.store.open(self.version)
        fill(stored, range(blocks))
        stored.close()
        self.current = True
        self.kernel = Kernel()
        self.told = Told()
        self.journal = OpenFileJournal(directory / "open", discard_existing=True)
        name = b"model.safetensors"
        entry = Entry(NODEID, NodeId(1), name, name.decode(), False, self.version, "", self.version.size, 0)
        catalog = SimpleNamespace(
            nodes=SimpleNamespace(entry_by_nodeid=lambda _nodeid: entry),
            index=SimpleNamespace(is_current=lambda _nodeid: self.current),
        )
        self.jobs = BackgroundJobs()
        self.is_started = False
        self.files = build_mounted_files(
            cast(Any, catalog),
            cast(Any, SimpleNamespace()),
            self.store,
            self.journal,
            events=EventHub(),
            jobs=self.jobs,
            backings=cast(Any, self.kernel),
            passthrough_state=PassthroughState(True, ""),
            trace_switch=TraceSwitch(),
            read_observer=cast(Any, self.told),
            open_wait_seconds=0.0,
            waits_for=lambda _key: False,
            set_read_ahead_limited=lambda _is_limited: None,
            inspector=cast(Any, inspector),
        )

    def start(self) -> None:
        """Do what is done in the background from now on, and what waits to be done."""
        self.is_started = True
        self.jobs.start()

    def settle(self) -> None:
        """Wait until all background jobs that were asked for are done."""
        done = threading.Event()
        self.jobs.run_in_background(done.set)
        assert done.wait(20)

    def close(self) -> None:
        if self.is_started:
            self.jobs.close()
            self.files.close()
        self.journal.close(remove=True)
        self.store.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def test_a_whole_file_has_one_backing_until_its_last_release(bench: Bench) -> None:
    bench.start()
    backing = bench.files.open_passthrough(PASSTHROUGH)
    assert bench.kernel.open_backings == {backing}
    assert bench.files.open_passthrough(PASSTHROUGH) == backing
    assert (bench.files.stats.passthrough_opens, bench.files.count_open_nodeids()) == (2, (1, 0))
    with pytest.raises(StoreError, match="in use"):
        bench.store.evict(bench.version.id)
    bench.files.release(PASSTHROUGH)
    bench.settle()
    assert bench.kernel.open_backings == {backing}
    bench.files.release(PASSTHROUGH)
    bench.settle()
    assert bench.kernel.open_backings == set()
    assert bench.store.evict(bench.version.id) > 0


def test_the_journal_knows_of_an_open_before_it_is_answered(bench: Bench, tmp_path: Path) -> None:
    backing = bench.files.open_passthrough(PASSTHROUGH)
    found = OpenFileJournal(tmp_path / "open", discard_existing=False)
    assert {nodeid: (each.backing_id, each.open_count) for nodeid, each in found.inherited_opens.items()} == {
        PASSTHROUGH: (backing, 1)
    }
    found.close(remove=False)


def test_the_observer_hears_of_an_open_after_the_reply_and_once(bench: Bench) -> None:
    bench.start()
    for _ in range(2):
        bench.files.open_passthrough(PASSTHROUGH)
    bench.settle()
    assert bench.told.heard == []
    for _ in range(2):
        bench.files.open_answered(PASSTHROUGH)
    bench.settle()
    assert bench.told.heard == ["opened with passthrough", "wanted whole"]
    for _ in range(2):
        bench.files.release(PASSTHROUGH)
    bench.settle()
    assert bench.told.heard == ["opened with passthrough", "wanted whole", "closed"]


def test_who_left_before_the_observer_heard_of_it_is_not_counted_as_a_reader(bench: Bench) -> None:
    """The reply is out before `opened` is called, so that another thread may have the RELEASE already."""
    bench.files.open_passthrough(PASSTHROUGH)
    file = bench.files._table.get(PASSTHROUGH)
    assert file is not None
    bench.files.release(PASSTHROUGH)
    bench.files.open_answered(PASSTHROUGH)
    bench.jobs.run_in_background(lambda: bench.files._reporter.report_passthrough_open(file))
    bench.start()
    bench.settle()
    assert bench.told.heard == []
    assert bench.kernel.open_backings == set()


def test_an_open_after_the_last_release_has_a_backing_of_its_own(bench: Bench) -> None:
    """The one before is closed by a background job that may still be waiting."""
    first = bench.files.open_passthrough(PASSTHROUGH)
    bench.files.release(PASSTHROUGH)
    second = bench.files.open_passthrough(PASSTHROUGH)
    bench.start()
    bench.settle()
    assert second != first
    assert bench.kernel.open_backings == {second}


def test_what_is_not_whole_is_left_to_others(tmp_path: Path) -> None:
    bench = Bench(tmp_path, blocks=3)
    try:
        assert bench.files.open_passthrough(PASSTHROUGH) == 0
        assert bench.files.stats.passthrough_opens == 0
        assert bench.files.count_open_nodeids() == (0, 0)
    finally:
        bench.close()


def test_what_the_kernel_refused_is_left_to_others_and_not_tried_again(bench: Bench) -> None:
    bench.kernel.error = OSError(errno.EINVAL, "Invalid argument")
    assert bench.files.open_passthrough(PASSTHROUGH) == 0
    bench.kernel.error = None
    assert bench.files.open_passthrough(PASSTHROUGH) == 0
    assert bench.kernel.opened == 1


def test_an_old_version_is_left_to_others_also_while_it_is_open(bench: Bench) -> None:
    assert bench.files.open_passthrough(PASSTHROUGH)
    bench.current = False
    assert bench.files.open_passthrough(PASSTHROUGH) == 0
    assert bench.files.stats.passthrough_opens == 1


def test_what_an_inspector_has_to_pass_is_left_to_others(tmp_path: Path) -> None:
    bench = Bench(tmp_path, inspector=object())
    try:
        assert bench.files.open_passthrough(PASSTHROUGH) == 0
    finally:
        bench.close()


def test_what_an_earlier_daemon_opened_is_left_to_others(bench: Bench, tmp_path: Path) -> None:
    bench.files.open_passthrough(PASSTHROUGH)
    journal = OpenFileJournal(tmp_path / "open", discard_existing=False)
    later = build_mounted_files(
        cast(Any, SimpleNamespace(index=SimpleNamespace(is_current=lambda _nodeid: True))),
        cast(Any, SimpleNamespace()),
        bench.store,
        journal,
        events=EventHub(),
        jobs=BackgroundJobs(),
        backings=cast(Any, bench.kernel),
        passthrough_state=PassthroughState(True, ""),
        trace_switch=TraceSwitch(),
        read_observer=cast(Any, bench.told),
        open_wait_seconds=0.0,
        waits_for=lambda _key: False,
        set_read_ahead_limited=lambda _is_limited: None,
        inspector=None,
    )
    assert later.open_passthrough(PASSTHROUGH) == 0
    assert later.count_open_nodeids() == (1, 0)
    journal.close(remove=False)


def test_what_was_prepared_and_never_opened_is_given_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VFS comes back to a prepared nodeid within STALE_RETRY_SECONDS, or never."""
    opener = bench.files._opener
    with opener._opening_lock:
        assert bench.files._passthrough._prepare_locked(PASSTHROUGH, bench.version, "")
    opener._drop_unopened()
    assert bench.files._table.get(PASSTHROUGH) is not None
    later = time.monotonic() + STALE_RETRY_SECONDS
    monkeypatch.setattr(open_files, "time", SimpleNamespace(monotonic=lambda: later))
    opener._drop_unopened()
    assert bench.files._table.get(PASSTHROUGH) is None
    bench.start()
    bench.settle()
    assert bench.kernel.open_backings == set()
