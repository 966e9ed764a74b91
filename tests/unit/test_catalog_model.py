"""The catalog against a model: random writes and deletions at the origin, refreshes, doubts, retained entries."""

from __future__ import annotations

from collections.abc import Callable

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecache.catalog.catalog import Catalog
from fusecache.catalog.entry import ROOT, Entry
from fusecache.events import EventHub
from fusecache.types import ObjectVersion
from tests.support.objects import Hand, Objects

KEYS = st.sampled_from(["a", "a/b", "a/b/c", "b", "b/", "c/d", "c/e", "c//x", "./y", "é/☃"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS),
        st.tuples(st.just("delete"), KEYS),
        st.tuples(st.just("refresh"), st.just("")),
        st.tuples(st.just("doubt"), KEYS),
        st.tuples(st.just("retain"), KEYS),
        st.tuples(st.just("forget"), KEYS),
    ),
    max_size=30,
)


def model(versions: dict[str, ObjectVersion]) -> dict[str, ObjectVersion | None]:
    """Path -> version (None: a directory), straight from the rules in SEMANTICS.md."""
    usable = [key for key in versions if "//" not in key and not key.startswith("./")]
    tree: dict[str, ObjectVersion | None] = {key: versions[key] for key in usable if not key.endswith("/")}
    for key in usable:
        parts = key.split("/")
        for end in range(1, len(parts)):
            tree["/".join(parts[:end])] = None
    return tree


async def _compare(steps: list[tuple[str, str]]) -> None:
    objects, hand = Objects(), Hand()
    catalog = Catalog([objects.source()], ttl=60, snapshot_dir=None, events=EventHub(), clock=hand)
    await catalog.listings.start()
    listed = dict(objects.versions)
    retained: dict[int, Entry] = {}

    async def put(key: str) -> None:
        objects.put(key)

    async def delete(key: str) -> None:
        objects.versions.pop(key, None)

    async def refresh(key: str) -> None:
        hand.now += 61
        await catalog.listings.refresh_if_stale()
        listed.clear()
        listed.update(objects.versions)

    async def doubt(key: str) -> None:
        entry = catalog.index.entry_by_path(key)
        if entry is not None and entry.version is not None:
            catalog.listings.report_stale_version(entry)
            await catalog.listings.lookup_fresh(entry.parent, entry.name)
            # only this object is asked for; a directory that it made stays until the next listing
            if key in objects.versions:
                listed[key] = objects.versions[key]

    async def retain(key: str) -> None:
        entry = catalog.index.entry_by_path(key)
        if entry is not None and entry.nodeid not in retained:
            retained[entry.nodeid] = entry
            catalog.nodes.retain_nodeid(entry.nodeid)

    async def forget(key: str) -> None:
        for nodeid in [each for each, entry in retained.items() if entry.path == key]:
            del retained[nodeid]
            catalog.nodes.release_nodeid(nodeid)

    actions: dict[str, Callable[[str], object]] = {
        "put": put,
        "delete": delete,
        "refresh": refresh,
        "doubt": doubt,
        "retain": retain,
        "forget": forget,
    }
    removed: set[str] = set()
    for action, key in steps:
        if action == "refresh":
            removed.clear()
        if action == "doubt" and catalog.index.entry_by_path(key) is not None and key not in objects.versions:
            removed.add(key)
        await actions[action](key)  # type: ignore[misc]
        expected = model(listed)
        for path in removed:
            if expected.get(path) is not None:
                del expected[path]
        assert {entry.path: entry.version for entry in catalog.index.walk_entries()} == expected
        numbers = [entry.nodeid for entry in catalog.index.walk_entries()]
        assert len(set(numbers)) == len(numbers)
        for nodeid, entry in retained.items():
            still = catalog.nodes.entry_by_nodeid(nodeid)
            assert still is not None
            assert (still.path, still.version) == (entry.path, entry.version)
        scanned = [entry.name for _, entry in catalog.index.scan_directory(ROOT, 0)]
        assert sorted(scanned) == [entry.name for entry in catalog.index.children(ROOT)]
    files = [entry for entry in catalog.index.walk_entries() if entry.version is not None]
    assert catalog.index.totals == (len(files), sum(entry.size for entry in files))


@settings(deadline=None, max_examples=80)
@given(STEPS)
def test_the_catalog_does_what_the_model_says(steps: list[tuple[str, str]]) -> None:
    trio.run(_compare, steps)
