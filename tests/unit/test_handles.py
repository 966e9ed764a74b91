"""Opens with passthrough: what the channel's threads ask of Handles, with a store on the disk and no kernel."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fusecache.catalog.entry import Entry
from fusecache.errors import StoreError
from fusecache.mount.backings import Passthrough
from fusecache.mount.handles import Handles
from fusecache.mount.journal import Journal
from fusecache.mount.nodeids import passthrough_twin
from fusecache.store.store import Store
from fusecache.types import NodeId, ObjectVersion
from tests.unit.test_store import BLOCK, LIMIT, fill, version

NODEID = NodeId(4711)
TWIN = passthrough_twin(NODEID)


class Kernel:
    """Backings without a kernel."""

    def __init__(self) -> None:
        self.opened = 0
        self.open_now: set[int] = set()
        self.error: OSError | None = None

    def open(self, fd: int) -> int:
        self.opened += 1
        if self.error is not None:
            raise self.error
        self.open_now.add(self.opened)
        return self.opened

    def close(self, backing: int) -> None:
        self.open_now.remove(backing)


class Told:
    """The parts of a loader that hear of opens."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.learning = self

    def entered(self, version: ObjectVersion, *, whole: bool) -> bool:
        self.heard.append(f"entered {'whole' if whole else 'in part'}")
        return True

    def follow(self, version: ObjectVersion, source: str) -> None:
        self.heard.append("follow")

    def left(self, version: ObjectVersion) -> None:
        self.heard.append("left")


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
        self.journal = Journal(directory / "open", fresh=True)
        name = b"model.safetensors"
        entry = Entry(NODEID, NodeId(1), name, name.decode(), False, self.version, "", self.version.size, 0)
        catalog = SimpleNamespace(get=lambda _nodeid: entry, is_current=lambda _nodeid: self.current)
        self.handles = Handles(
            cast(Any, catalog),
            cast(Any, self.told),
            self.store,
            self.journal,
            backings=cast(Any, self.kernel),
            passthrough=Passthrough(True, ""),
            inspector=cast(Any, inspector),
        )

    def start(self) -> None:
        """What handles.start() does, without an event loop."""
        self.handles._thread.start()

    def settle(self) -> None:
        """Wait until all chores that were asked for are done."""
        done = threading.Event()
        self.handles.later(done.set)
        assert done.wait(20)

    def close(self) -> None:
        if self.handles._thread.is_alive():
            self.handles.close()
        self.journal.close(remove=True)
        self.store.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def test_a_whole_file_has_one_backing_until_its_last_release(bench: Bench) -> None:
    bench.start()
    backing = bench.handles.open_whole(TWIN)
    assert bench.kernel.open_now == {backing}
    assert bench.handles.open_whole(TWIN) == backing
    assert (bench.handles.stats.passthrough, bench.handles.open_now()) == (2, (1, 0))
    with pytest.raises(StoreError, match="in use"):
        bench.store.evict(bench.version.id)
    bench.handles.release(TWIN)
    bench.settle()
    assert bench.kernel.open_now == {backing}
    bench.handles.release(TWIN)
    bench.settle()
    assert bench.kernel.open_now == set()
    assert bench.store.evict(bench.version.id) > 0


def test_the_journal_knows_of_an_open_before_it_is_answered(bench: Bench, tmp_path: Path) -> None:
    backing = bench.handles.open_whole(TWIN)
    found = Journal(tmp_path / "open", fresh=False)
    assert {nodeid: (each.backing, each.count) for nodeid, each in found.inherited.items()} == {
        TWIN: (backing, 1)
    }
    found.close(remove=False)


def test_the_loader_hears_of_an_open_after_the_reply_and_once(bench: Bench) -> None:
    bench.start()
    for _ in range(2):
        bench.handles.open_whole(TWIN)
    bench.settle()
    assert bench.told.heard == []
    for _ in range(2):
        bench.handles.opened(TWIN)
    bench.settle()
    assert bench.told.heard == ["entered whole", "follow"]
    for _ in range(2):
        bench.handles.release(TWIN)
    bench.settle()
    assert bench.told.heard == ["entered whole", "follow", "left"]


def test_who_left_before_the_loader_heard_of_it_is_not_counted_as_a_reader(bench: Bench) -> None:
    """The reply is out before `opened` is called, so that another thread may have the RELEASE already."""
    bench.handles.open_whole(TWIN)
    file = bench.handles._files[TWIN]
    bench.handles.release(TWIN)
    bench.handles.opened(TWIN)
    bench.handles.later(lambda: bench.handles._follow(file))
    bench.start()
    bench.settle()
    assert bench.told.heard == []
    assert bench.kernel.open_now == set()


def test_an_open_after_the_last_release_has_a_backing_of_its_own(bench: Bench) -> None:
    """The one before is closed by a chore that may still be waiting."""
    first = bench.handles.open_whole(TWIN)
    bench.handles.release(TWIN)
    second = bench.handles.open_whole(TWIN)
    bench.start()
    bench.settle()
    assert second != first
    assert bench.kernel.open_now == {second}


def test_what_is_not_whole_is_left_to_others(tmp_path: Path) -> None:
    bench = Bench(tmp_path, blocks=3)
    try:
        assert bench.handles.open_whole(TWIN) == 0
        assert bench.handles.stats.passthrough == 0
        assert bench.handles.open_now() == (0, 0)
    finally:
        bench.close()


def test_what_the_kernel_refused_is_left_to_others_and_not_tried_again(bench: Bench) -> None:
    bench.kernel.error = OSError(errno.EINVAL, "Invalid argument")
    assert bench.handles.open_whole(TWIN) == 0
    bench.kernel.error = None
    assert bench.handles.open_whole(TWIN) == 0
    assert bench.kernel.opened == 1


def test_an_old_version_is_left_to_others_also_while_it_is_open(bench: Bench) -> None:
    assert bench.handles.open_whole(TWIN)
    bench.current = False
    assert bench.handles.open_whole(TWIN) == 0
    assert bench.handles.stats.passthrough == 1


def test_what_an_inspector_has_to_pass_is_left_to_others(tmp_path: Path) -> None:
    bench = Bench(tmp_path, inspector=object())
    try:
        assert bench.handles.open_whole(TWIN) == 0
    finally:
        bench.close()


def test_what_an_earlier_daemon_opened_is_left_to_others(bench: Bench, tmp_path: Path) -> None:
    bench.handles.open_whole(TWIN)
    journal = Journal(tmp_path / "open", fresh=False)
    later = Handles(
        cast(Any, SimpleNamespace(is_current=lambda _nodeid: True)),
        cast(Any, bench.told),
        bench.store,
        journal,
        backings=cast(Any, bench.kernel),
        passthrough=Passthrough(True, ""),
    )
    assert later.open_whole(TWIN) == 0
    assert later.open_now() == (1, 0)
    journal.close(remove=False)
