"""The catalog over sources in memory: freshness, outages, retained entries, several sources, saved listings."""

from __future__ import annotations

import gzip
import json
import logging
import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from fusecache.catalog.catalog import Catalog
from fusecache.catalog.entry import ROOT, Entry
from fusecache.catalog.listing import START_LISTING_WAIT
from fusecache.catalog.saved_listing import load_listing, save_listing, saved_path
from fusecache.catalog.shared_request import REQUEST_WAIT
from fusecache.errors import (
    AccessDeniedError,
    ConfigError,
    NotFoundError,
    TemporaryOriginError,
    UnavailableError,
)
from fusecache.events import ChangedNames, EventHub
from tests.support.objects import Hand, Objects


def paths(catalog: Catalog) -> list[str]:
    return [entry.path for entry in catalog.index.walk_entries()]


def found(catalog: Catalog, path: str) -> Entry:
    entry = catalog.index.entry_by_path(path)
    assert entry is not None
    return entry


async def started(
    *objects: Objects,
    ttl: float = 60,
    negative_ttl: float | None = None,
    directory: Path | None = None,
    events: EventHub | None = None,
) -> tuple[Catalog, Hand]:
    hand = Hand()
    names = [""] if len(objects) == 1 else [f"source{number}" for number in range(len(objects))]
    catalog = Catalog(
        [each.source(name) for each, name in zip(objects, names, strict=True)],
        ttl=ttl,
        negative_ttl=negative_ttl,
        snapshot_dir=directory,
        clock=hand,
        events=events or EventHub(),
    )
    await catalog.listings.start()
    return catalog, hand


async def test_names_are_answered_from_one_listing() -> None:
    objects = Objects()
    for key in ("a", "d/b", "d/e/c"):
        objects.put(key)
    catalog, _ = await started(objects)
    for _ in range(3):
        entry = await catalog.listings.lookup_fresh(ROOT, b"a")
        assert entry is not None
        assert entry.version == objects.versions["a"]
        assert await catalog.listings.lookup_fresh(ROOT, b"nothing") is None
        assert await catalog.listings.lookup_fresh(entry.nodeid, b"below a file") is None
    assert paths(catalog) == ["a", "d", "d/b", "d/e", "d/e/c"]
    assert [each.name for each in catalog.index.children(found(catalog, "d").nodeid)] == [b"b", b"e"]
    version = found(catalog, "d/b").version
    assert version is not None
    assert catalog.index.siblings(version) == [version]
    assert (
        catalog.index.entry_by_path("d/x")
        is catalog.index.entry_by_path("a/x")
        is catalog.index.entry_by_path("\ud800")
        is None
    )
    assert found(catalog, "").nodeid == ROOT
    assert catalog.index.totals == (3, 30)
    assert (objects.lists, objects.stats) == (1, 0)


async def test_a_stale_listing_is_made_again_by_the_next_lookup() -> None:
    objects = Objects()
    old = objects.put("a")
    catalog, hand = await started(objects, ttl=60)
    new = objects.put("a")
    objects.put("b")
    entry = await catalog.listings.lookup_fresh(ROOT, b"a")
    assert entry is not None
    assert entry.version == old
    assert catalog.listings.remaining_ttl(entry) == 60
    hand.now += 61
    assert catalog.listings.remaining_ttl(entry) == 1.0
    async with trio.open_nursery() as nursery:  # all of them share one LIST
        for _ in range(10):
            nursery.start_soon(catalog.listings.lookup_fresh, ROOT, b"a")
    entry = await catalog.listings.lookup_fresh(ROOT, b"a")
    assert entry is not None
    assert entry.version == new
    assert catalog.index.entry_by_path("b") is not None
    assert objects.lists == 2
    assert catalog.listings.oldest_age == 0


async def test_the_absence_of_a_name_has_a_time_of_its_own() -> None:
    objects = Objects()
    objects.put("a")
    catalog, hand = await started(objects, ttl=60, negative_ttl=5)
    objects.put("b")
    assert await catalog.listings.lookup_fresh(ROOT, b"b") is None
    assert catalog.listings.remaining_negative_ttl(ROOT) == 5
    hand.now += 6
    assert await catalog.listings.lookup_fresh(ROOT, b"a") is not None
    assert objects.lists == 1
    assert await catalog.listings.lookup_fresh(ROOT, b"b") is not None
    assert objects.lists == 2


async def test_ttl_zero_lists_for_every_lookup() -> None:
    objects = Objects()
    catalog, _ = await started(objects, ttl=0)
    for number in range(1, 4):
        objects.put(f"{number}")
        assert await catalog.listings.lookup_fresh(ROOT, f"{number}".encode()) is not None
    assert catalog.listings.remaining_ttl(found(catalog, "1")) == 0


async def test_an_outage_leaves_the_tree_as_it_is_and_is_not_asked_at_every_lookup(
    caplog: pytest.LogCaptureFixture,
) -> None:
    objects = Objects()
    objects.put("a")
    catalog, hand = await started(objects)
    hand.now += 100
    objects.error = UnavailableError("the endpoint does not answer")
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            assert await catalog.listings.lookup_fresh(ROOT, b"a") is not None
            assert await catalog.listings.lookup_fresh(ROOT, b"b") is None
        assert objects.lists == 2
        hand.now += 1.5
        assert await catalog.listings.lookup_fresh(ROOT, b"a") is not None
        assert objects.lists == 3
    assert caplog.text.count("does not answer") == 1
    assert catalog.listings.errors == {"": "the endpoint does not answer"}
    with pytest.raises(UnavailableError):
        await catalog.listings.refresh()
    objects.error = None
    objects.put("b")
    hand.now += 30
    assert await catalog.listings.lookup_fresh(ROOT, b"b") is not None
    assert catalog.listings.errors == {}


async def test_a_slow_listing_holds_up_one_lookup_for_two_seconds_and_the_others_not(
    autojump_clock: trio.testing.MockClock,
) -> None:
    objects = Objects()
    objects.put("a")
    catalog, hand = await started(objects)
    hand.now += 100
    objects.gate.clear()
    objects.put("b")
    try:
        began = trio.current_time()
        assert await catalog.listings.lookup_fresh(ROOT, b"a") is not None
        assert trio.current_time() - began == pytest.approx(REQUEST_WAIT)
        began = trio.current_time()
        for _ in range(100):
            assert await catalog.listings.lookup_fresh(ROOT, b"a") is not None
            assert await catalog.listings.lookup_fresh(ROOT, b"b") is None
        assert trio.current_time() == began
    finally:
        objects.gate.set()
    await catalog.listings.refresh()
    # the slow one, and the refresh unless it joined that; none for the 200 lookups
    assert objects.lists in (2, 3)
    assert catalog.index.entry_by_path("b") is not None


async def test_a_caller_that_is_cancelled_does_not_take_the_listing_with_it() -> None:
    objects = Objects()
    catalog, hand = await started(objects)
    hand.now += 100
    objects.put("a")
    objects.gate.clear()
    objects.listing.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(catalog.listings.lookup_fresh, ROOT, b"a")
        await trio.to_thread.run_sync(objects.listing.wait)
        nursery.cancel_scope.cancel()
    objects.gate.set()
    assert await catalog.listings.lookup_fresh(ROOT, b"a") is not None
    assert objects.lists == 2


async def test_a_refresh_begins_after_it_is_asked_for() -> None:
    objects = Objects()
    catalog, _ = await started(objects)
    objects.gate.clear()
    objects.listing.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(catalog.listings.refresh)
        await trio.to_thread.run_sync(objects.listing.wait)
        objects.put("a")  # too late for the first
        nursery.start_soon(catalog.listings.refresh)
        await trio.testing.wait_all_tasks_blocked()
        objects.gate.set()
    assert catalog.index.entry_by_path("a") is not None
    assert objects.lists == 3


async def test_changes_are_told_with_the_names_to_look_up_again() -> None:
    objects = Objects()
    for key in ("same", "d/changed", "d/removed"):
        objects.put(key)
    events = EventHub()
    catalog, _ = await started(objects, events=events)
    told: list[ChangedNames] = []
    events.names_changed.subscribe(told.append)
    await catalog.listings.refresh()
    assert told == []
    objects.put("d/changed")
    objects.delete("d/removed")
    objects.put("d/added")
    await catalog.listings.refresh()
    directory = found(catalog, "d").nodeid
    assert [sorted(each) for each in told] == [
        [(directory, name) for name in (b"added", b"changed", b"removed")]
    ]


async def test_what_the_kernel_knows_stays_resolvable() -> None:
    objects = Objects()
    objects.put("a")
    catalog, _ = await started(objects)
    first = found(catalog, "a")
    catalog.nodes.retain_nodeid(first.nodeid)
    catalog.nodes.retain_nodeid(first.nodeid)
    objects.put("a")
    await catalog.listings.refresh()
    second = found(catalog, "a")
    assert second.nodeid != first.nodeid
    assert catalog.nodes.entry_by_nodeid(first.nodeid) is first
    assert (catalog.index.is_current(first.nodeid), catalog.index.is_current(second.nodeid)) == (False, True)
    catalog.nodes.release_nodeid(first.nodeid)
    assert catalog.nodes.entry_by_nodeid(first.nodeid) is first
    catalog.nodes.release_nodeid(first.nodeid, 5)
    assert catalog.nodes.entry_by_nodeid(first.nodeid) is None
    objects.delete("a")
    await catalog.listings.refresh()  # the second was not retained
    assert catalog.nodes.entry_by_nodeid(second.nodeid) is None
    assert found(catalog, "").nodeid == ROOT


async def test_an_object_that_goes_back_to_an_earlier_version_has_its_number_again() -> None:
    objects = Objects()
    version = objects.put("a")
    catalog, _ = await started(objects)
    first = found(catalog, "a")
    catalog.nodes.retain_nodeid(first.nodeid)
    objects.put("a")
    await catalog.listings.refresh()
    objects.versions["a"] = version
    await catalog.listings.refresh()
    assert found(catalog, "a").nodeid == first.nodeid
    assert catalog.index.is_current(first.nodeid)
    catalog.nodes.release_nodeid(first.nodeid)
    assert catalog.nodes.entry_by_nodeid(first.nodeid) is found(catalog, "a")


async def test_a_version_that_is_gone_is_asked_for_at_once() -> None:
    objects = Objects()
    for key in ("a", "b", "c"):
        objects.put(key)
    catalog, _ = await started(objects)
    changed, removed, same = (found(catalog, key) for key in "abc")
    new = objects.put("a")
    objects.delete("b")
    for entry in (changed, removed, same):
        await trio.to_thread.run_sync(catalog.listings.report_stale_version, entry)
    now = await catalog.listings.lookup_fresh(ROOT, b"a")
    assert now is not None
    assert now.version == new
    assert await catalog.listings.lookup_fresh(ROOT, b"b") is None
    assert await catalog.listings.lookup_fresh(ROOT, b"c") is same
    assert (objects.lists, objects.stats) == (1, 3)
    catalog.listings.report_stale_version(changed)  # not in the tree any more: nothing to ask
    assert await catalog.listings.lookup_fresh(ROOT, b"a") is now
    assert objects.stats == 3


async def test_the_event_of_a_version_that_is_gone_is_heard() -> None:
    objects = Objects()
    old = objects.put("d/a")
    events = EventHub()
    catalog, _ = await started(objects, events=events)
    parent = found(catalog, "d").nodeid
    new = objects.put("d/a")
    await trio.to_thread.run_sync(events.object_gone.publish, old)
    entry = await catalog.listings.lookup_fresh(parent, b"a")
    assert entry is not None
    assert entry.version == new
    events.object_gone.publish(old)  # no file shows it any more
    assert await catalog.listings.lookup_fresh(parent, b"a") is entry
    assert objects.stats == 1


async def test_a_doubt_that_the_origin_can_not_settle_holds_up_one_lookup_only() -> None:
    objects = Objects()
    objects.put("a")
    catalog, _ = await started(objects)
    objects.error = TemporaryOriginError("reset")
    catalog.listings.report_stale_version(found(catalog, "a"))
    for _ in range(3):
        assert await catalog.listings.lookup_fresh(ROOT, b"a") is not None
    assert objects.stats == 1


async def test_several_sources_are_directories_of_one_root() -> None:
    one, two = Objects("memory://one"), Objects("memory://two")
    one.put("a/b")
    two.put("a/b")
    catalog, _ = await started(one, two)
    assert paths(catalog) == [
        "source0",
        "source0/a",
        "source0/a/b",
        "source1",
        "source1/a",
        "source1/a/b",
    ]
    assert len({entry.nodeid for entry in catalog.index.walk_entries()}) == 6
    entry = await catalog.listings.lookup_fresh(ROOT, b"source1")
    assert entry is found(catalog, "source1")
    assert await catalog.listings.lookup_fresh(ROOT, b"source2") is None
    assert [each.name for _, each in catalog.index.scan_directory(ROOT, 0)] == [b"source0", b"source1"]
    assert [each.name for _, each in catalog.index.scan_directory(ROOT, 3)] == [b"source1"]
    assert [each.path for each in catalog.index.children(ROOT)] == ["source0", "source1"]
    assert catalog.listings.origin_identity(found(catalog, "source1/a")) == "memory://two"
    assert catalog.listings.origin_identity(found(catalog, "")) == ""
    version = found(catalog, "source1/a/b").version
    assert version is not None
    assert catalog.index.entry_of_version(version) is found(catalog, "source1/a/b")
    assert catalog.index.find_object(version, "a/b") == version
    assert catalog.index.find_object(version, "b") is None
    assert catalog.index.siblings(version) == [version]
    assert catalog.index.totals == (2, 20)
    assert catalog.index.is_current(ROOT)


async def test_a_source_that_can_not_be_listed_hides_nothing_and_tells_no_lie() -> None:
    good, bad = Objects("memory://good"), Objects("memory://bad")
    good.put("a")
    bad.put("b")
    bad.error = UnavailableError("down")
    catalog, hand = await started(good, bad)
    assert paths(catalog) == ["source0", "source0/a", "source1"]
    directory = found(catalog, "source1")
    for name in (b"b", b"x"):
        with pytest.raises(UnavailableError):
            await catalog.listings.lookup_fresh(directory.nodeid, name)
    with pytest.raises(UnavailableError):
        await catalog.listings.require_fresh_listing(directory)
    await catalog.listings.require_fresh_listing(found(catalog, "source0"))
    await catalog.listings.require_fresh_listing(found(catalog, ""))
    assert catalog.listings.oldest_age == -1.0
    bad.error = None
    hand.now += 100
    assert await catalog.listings.lookup_fresh(directory.nodeid, b"b") is not None
    await catalog.listings.require_fresh_listing(directory)


async def test_when_no_source_can_be_listed_the_mount_fails() -> None:
    one, two = Objects("memory://one"), Objects("memory://two")
    one.error = two.error = NotFoundError("no such bucket")
    with pytest.raises(NotFoundError, match="no such bucket"):
        await started(one, two)


def test_sources_that_can_not_share_a_root() -> None:
    for names in ((), ("", "a"), ("a", "a")):
        with pytest.raises(ConfigError):
            Catalog([Objects().source(name) for name in names], ttl=1, snapshot_dir=None, events=EventHub())


async def _saved(objects: Objects, directory: Path) -> None:
    catalog, _ = await started(objects, directory=directory)
    await trio.testing.wait_all_tasks_blocked()
    while not saved_path(directory, objects.identity).exists():
        await catalog.listings.refresh()


async def test_a_mount_during_an_outage_has_the_tree_saved_before(tmp_path: Path) -> None:
    objects = Objects()
    for key in ("a", "d/b c", "ü/\udcff", "e/"):
        objects.put(key)
    before, _ = await started(objects, directory=tmp_path)
    await _saved(objects, tmp_path)
    objects.error = UnavailableError("down")
    after, hand = await started(objects, directory=tmp_path)
    assert [(each.path, each.nodeid) for each in after.index.walk_entries()] == [
        (each.path, each.nodeid) for each in before.index.walk_entries()
    ]
    assert after.listings.oldest_age == -1.0
    objects.error = None
    objects.put("new")
    hand.now += 100
    assert await after.listings.lookup_fresh(ROOT, b"new") is not None


async def test_a_slow_listing_does_not_keep_a_mount_with_a_saved_one_waiting(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    objects = Objects()
    save_listing(tmp_path, objects.identity, [objects.put("a")])
    objects.put("b")
    objects.gate.clear()
    try:
        catalog, _ = await started(objects, directory=tmp_path)
        assert trio.current_time() == pytest.approx(START_LISTING_WAIT)
        assert paths(catalog) == ["a"]
    finally:
        objects.gate.set()
    await catalog.listings.refresh()
    assert paths(catalog) == ["a", "b"]


@pytest.mark.parametrize("error", [AccessDeniedError("403"), NotFoundError("404")])
async def test_a_saved_listing_does_not_hide_a_mistake(tmp_path: Path, error: Exception) -> None:
    objects = Objects()
    save_listing(tmp_path, objects.identity, [objects.put("a")])
    objects.error = error  # type: ignore[assignment]
    with pytest.raises(type(error)):
        await started(objects, directory=tmp_path)


def test_a_saved_listing_is_read_as_it_was_written(tmp_path: Path) -> None:
    objects = Objects("s3://bucket/prefix@http://localhost")
    versions = [objects.put(f"k/{number}\n☃", number) for number in range(2500)]
    assert load_listing(tmp_path, objects.identity) is None
    save_listing(tmp_path / "below", objects.identity, versions)
    assert load_listing(tmp_path / "below", objects.identity) == versions
    assert load_listing(tmp_path / "below", "s3://another") is None
    save_listing(tmp_path / "below", objects.identity, [])
    assert load_listing(tmp_path / "below", objects.identity) == []
    assert [path.name for path in (tmp_path / "below").iterdir()] == [
        saved_path(tmp_path, objects.identity).name
    ]


def test_the_format_of_a_saved_listing(tmp_path: Path) -> None:
    objects = Objects()
    save_listing(tmp_path, objects.identity, [objects.put("a", 3)])
    lines = gzip.decompress(saved_path(tmp_path, objects.identity).read_bytes()).decode().splitlines()
    header = json.loads(lines[0])
    assert header.pop("listed_at") > 0
    assert header == {
        "format": "fusecache-listing",
        "version": 1,
        "identity": objects.identity,
        "origin": objects.identity,
        "objects": 1,
    }
    assert [json.loads(line) for line in lines[1:]] == [[["a", '"1"', 3, 1_000_000_000]]]


def test_a_damaged_saved_listing_counts_as_absent(tmp_path: Path) -> None:
    objects = Objects()
    save_listing(tmp_path, objects.identity, [objects.put(f"{number}") for number in range(50)])
    path = saved_path(tmp_path, objects.identity)
    whole = path.read_bytes()
    damaged = [whole[:cut] for cut in (0, 1, 10, len(whole) // 2, len(whole) - 1)]
    damaged.append(b"\0" * 100)
    for lines in (
        [],
        [{"format": "other"}],
        [
            {
                "format": "fusecache-listing",
                "version": 2,
                "identity": objects.identity,
                "objects": 0,
                "origin": "",
            }
        ],
        [{"format": "fusecache-listing", "version": 1, "identity": "other", "objects": 0, "origin": ""}],
        [
            {
                "format": "fusecache-listing",
                "version": 1,
                "identity": objects.identity,
                "objects": 1,
                "origin": "",
            }
        ],
        [7],
    ):
        damaged.append(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    for data in damaged:
        path.write_bytes(data)
        assert load_listing(tmp_path, objects.identity) is None


async def test_a_listing_that_can_not_be_saved_is_served_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    objects = Objects()
    objects.put("a")
    (tmp_path / "file").write_bytes(b"")
    catalog, _ = await started(objects, directory=tmp_path / "file" / "below")
    assert paths(catalog) == ["a"]


async def test_a_source_without_an_object_is_reported_whenever_it_becomes_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    objects = Objects()
    with caplog.at_level(logging.WARNING):
        catalog, _ = await started(objects)
        await catalog.listings.refresh()
        assert caplog.text.count("no object is there") == 1
        objects.put("a")
        await catalog.listings.refresh()
        objects.delete("a")
        await catalog.listings.refresh()
        assert caplog.text.count("no object is there") == 2


async def test_odd_keys_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    objects = Objects()
    for key in ("a", "a/b", "x//1", "x//2"):
        objects.put(key)
    with caplog.at_level(logging.WARNING):
        catalog, _ = await started(objects)
        objects.put("x//3")
        await catalog.listings.refresh()
    assert [record.getMessage() for record in caplog.records] == [
        "memory://bucket: 2 keys with an empty name between slashes, like 'x//1' (see SEMANTICS.md)",
        "memory://bucket: 1 keys with the same path as a directory, which wins, like 'a' (see SEMANTICS.md)",
    ]


async def test_a_name_that_is_listed_is_never_absent_for_a_moment() -> None:
    objects = Objects()
    for number in range(300):
        objects.put(f"d/{number}")
    catalog, _ = await started(objects)
    stop, missed = threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            for path in ("d/0", "d/299"):
                entry = catalog.index.entry_by_path(path)
                if entry is None or catalog.nodes.entry_by_nodeid(entry.parent) is None:
                    missed.append(path)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, look)
        for number in range(1, 30):
            objects.put(f"d/{number}")
            await catalog.listings.refresh()
        stop.set()
    assert missed == []
