"""Keys become paths: what is in the tree, what is left out, and what its numbers are made of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusecache.catalog.entry import ROOT
from fusecache.catalog.names import NAME_MAX, SkipReason
from fusecache.catalog.tree import FIRST_CURSOR, Tree, build_tree, find_changed_names
from fusecache.types import ObjectVersion


def version(key: str, etag: str = "1", size: int = 3, mtime_ns: int = 5) -> ObjectVersion:
    return ObjectVersion("memory://b", key, etag, size, mtime_ns)


def tree(*keys: str, source: str = "", before: Tree | None = None) -> Tree:
    return build_tree(source, [version(key) for key in keys], before=before, empty_mtime_ns=7)


def paths(found: Tree) -> list[str]:
    return [entry.path + "/" * entry.is_dir for entry in found.walk_entries()]


def test_directories_are_made_of_keys() -> None:
    found = tree("b/c/d", "a", "b/a")
    assert paths(found) == ["a", "b/", "b/a", "b/c/", "b/c/d"]
    assert found.root.nodeid == ROOT
    assert found.root.path == ""
    assert (found.file_count, found.total_bytes) == (3, 9)
    assert found.skipped == {}


def test_a_named_source_is_a_directory_below_the_root() -> None:
    found = tree("a/b", source="models")
    assert paths(found) == ["models/a/", "models/a/b"]
    assert found.root.nodeid != ROOT
    assert (found.root.parent, found.root.name, found.root.path) == (ROOT, b"models", "models")
    file = found.lookup(found.lookup(found.root.nodeid, b"a").nodeid, b"b")  # type: ignore[union-attr]
    assert file is not None
    assert file.version is not None
    assert (file.path, file.version.key, file.source) == ("models/a/b", "a/b", "models")


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("", None),
        ("/a", SkipReason.EMPTY),
        ("a//b", SkipReason.EMPTY),
        ("a//", SkipReason.EMPTY),
        ("//", SkipReason.EMPTY),
        ("./a", SkipReason.DOTS),
        ("a/../b", SkipReason.DOTS),
        ("a/..", SkipReason.DOTS),
        ("a/./", SkipReason.DOTS),
        ("a\0b", SkipReason.NUL),
        ("n" * (NAME_MAX + 1), SkipReason.LONG),
        ("n" * (NAME_MAX + 1) + "/a", SkipReason.LONG),
        ("é" * 128, SkipReason.LONG),
        ("\ud800", SkipReason.ENCODING),
    ],
)
def test_keys_that_no_path_can_spell(key: str, reason: SkipReason | None) -> None:
    found = tree("ok", key)
    assert paths(found) == ["ok"]
    assert found.skipped == ({reason: (1, key)} if reason else {})


@pytest.mark.parametrize(
    "key", ["n" * NAME_MAX, "é" * 127, "a b", "\n", "ünï/☃", "..a", "a.", "\udcff", " ", "-"]
)
def test_unusual_names_that_a_path_can_spell(key: str) -> None:
    assert [path for path in paths(tree(key)) if not path.endswith("/")] == [key]


def test_a_trailing_slash_marks_a_directory() -> None:
    found = build_tree("", [version("empty/", size=0), version("full/", size=4), version("full/a")])
    assert paths(found) == ["empty/", "full/", "full/a"]
    assert found.skipped == {SkipReason.MARKER: (1, "full/")}


def test_where_a_file_and_a_directory_have_one_path_the_directory_wins() -> None:
    for keys in (("a", "a/b"), ("a/b", "a"), ("a", "a/"), ("x/a/b/c", "x/a")):
        found = tree(*keys)
        assert all(entry.is_dir for entry in found.walk_entries() if entry.name == b"a")
        assert found.skipped[SkipReason.SHADOWED][0] == 1


def test_the_number_of_a_file_names_one_version_and_that_of_a_directory_a_path() -> None:
    def numbers(*versions: ObjectVersion) -> dict[str, int]:
        return {entry.path: entry.nodeid for entry in build_tree("", versions).walk_entries()}

    first = numbers(version("d/a"))
    assert numbers(version("d/a"), version("z")) == first | {"z": numbers(version("z"))["z"]}
    for other in (version("d/a", etag="2"), version("d/a", size=4), version("d/a", mtime_ns=6)):
        second = numbers(other)
        assert second["d"] == first["d"]
        assert second["d/a"] != first["d/a"]
    assert all(1 < number < 1 << 62 for number in first.values())


def test_numbers_that_are_taken_are_avoided_in_the_same_way_every_time() -> None:
    free = {entry.path: entry.nodeid for entry in tree("a", "d/b").walk_entries()}
    taken = set(free.values())

    def numbers() -> dict[str, int]:
        found = build_tree("", [version("a"), version("d/b")], is_taken=taken.__contains__)
        return {entry.path: entry.nodeid for entry in found.walk_entries()}

    assert numbers() == numbers()
    assert taken.isdisjoint(numbers().values())
    assert len(set(numbers().values())) == 3


def test_what_did_not_change_is_taken_over() -> None:
    before = tree("a", "d/b", "d/c")
    after = build_tree("", [version("a"), version("d/b", etag="2"), version("d/e")], before=before)
    assert after.lookup(ROOT, b"a") is before.lookup(ROOT, b"a")
    directory = after.lookup(ROOT, b"d")
    assert directory is not None
    assert directory is before.lookup(ROOT, b"d")
    assert sorted(find_changed_names(before, after)) == [
        (directory.nodeid, name) for name in (b"b", b"c", b"e")
    ]
    assert find_changed_names(after, after) == []


def test_a_directory_is_as_young_as_what_is_below_it() -> None:
    found = build_tree(
        "", [version("a/b/c", mtime_ns=9), version("a/d", mtime_ns=4), version("e/")], empty_mtime_ns=7
    )
    times = {entry.path: entry.mtime_ns for entry in [found.root, *found.walk_entries()]}
    assert times == {"": 9, "a": 9, "a/b": 9, "a/b/c": 9, "a/d": 4, "e": 7}


def test_one_file_is_replaced_or_taken_out() -> None:
    before = tree("a", "d/b", "d/c")
    entry = next(each for each in before.walk_entries() if each.path == "d/b")
    after = before.replace_version(entry, version("d/b", etag="2", size=10))
    assert paths(after) == paths(before)
    assert (after.file_count, after.total_bytes) == (3, 16)
    new = after.lookup(entry.parent, b"b")
    assert new is not None
    assert new.size == 10
    assert after.entries_by_id.get(entry.nodeid) is None
    assert after.entries_by_id[new.nodeid] is new
    gone = after.replace_version(new, None)
    assert paths(gone) == ["a", "d/", "d/c"]
    assert (gone.file_count, gone.total_bytes) == (2, 6)
    assert paths(before) == ["a", "d/", "d/b", "d/c"]


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=6).filter(
    lambda name: name not in (".", "..")
)


@given(st.sets(NAMES), st.sets(NAMES), st.integers(0, 9))
def test_a_scan_meets_each_name_that_stays_exactly_once(first: set[str], second: set[str], stop: int) -> None:
    before, after = tree(*first), tree(*second)
    seen: list[bytes] = []
    cursor = 0
    for cursor, entry in before.scan_directory(ROOT, 0):
        assert cursor >= FIRST_CURSOR
        seen.append(entry.name)
        if len(seen) > stop:
            break
    seen += [entry.name for _, entry in after.scan_directory(ROOT, cursor)]
    assert len(seen) == len(set(seen))
    assert (
        {name.encode() for name in first & second} <= set(seen) <= {name.encode() for name in first | second}
    )


@given(st.lists(st.lists(NAMES, min_size=1, max_size=3).map("/".join), unique=True))
def test_the_tree_is_what_the_keys_say(keys: list[str]) -> None:
    found = tree(*keys)
    directories = {key[:at] for key in keys for at, char in enumerate(key) if char == "/"}
    assert {entry.path for entry in found.walk_entries() if entry.is_dir} == directories
    assert {entry.path for entry in found.walk_entries() if not entry.is_dir} == set(keys) - directories
    assert len(found.entries_by_id) == len(set(keys) | directories) + 1
    for entry in found.walk_entries():
        assert found.entries_by_id[entry.nodeid] is entry
        assert found.lookup(entry.parent, entry.name) is entry
        assert (
            found.lookup(entry.parent, entry.name + b"!") is None
            or entry.path + "!" in set(keys) | directories
        )
    for children in found.children_by_id.values():
        names = [entry.name for entry in children]
        assert names == sorted(names)
