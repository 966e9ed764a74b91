"""A restarted daemon finds out which files are open."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusecache.types import ObjectVersion
from fusecache_mount.fs.journal import OpenFileJournal

FILE = ObjectVersion("s3://b", "k\udc80/ü", "e", 10, 5)


def test_open_files_are_inherited(tmp_path: Path) -> None:
    path = tmp_path / "open"
    first = OpenFileJournal(path, discard_existing=True)
    first.record_open(1, FILE, "src", 0)
    first.record_open(1, FILE, "src", 0)
    first.record_open(2, FILE, "src", 9)
    first.record_open(3, FILE, "src", 0)
    first.record_release(3)
    first.record_release(1)
    first.record_release(77)
    second = OpenFileJournal(path, discard_existing=False)
    found = {
        nodeid: (r.version, r.source, r.backing_id, r.open_count)
        for nodeid, r in second.inherited_opens.items()
    }
    assert found == {1: (FILE, "src", 0, 1), 2: (FILE, "src", 9, 1)}
    assert next(iter(second.inherited_opens.values())).version.id == FILE.id
    second.record_release(1)
    third = OpenFileJournal(path, discard_existing=False)
    assert set(third.inherited_opens) == {2}
    for journal in (first, second, third):
        journal.close(remove=False)


@pytest.mark.parametrize("is_compacted", [False, True])
def test_the_newest_backing_counts_while_a_release_is_still_to_be_recorded(
    tmp_path: Path, is_compacted: bool
) -> None:
    path = tmp_path / "open"
    journal = OpenFileJournal(path, discard_existing=True)
    journal.record_open(1, FILE, "src", 5)
    journal.record_open(1, FILE, "src", 6)  # the open of backing 5 was closed, and its release is queued
    journals = [journal]
    if is_compacted:
        journals.append(OpenFileJournal(path, discard_existing=False))  # writes the file anew
    journals[-1].record_release(1)
    journals.append(OpenFileJournal(path, discard_existing=False))
    record = journals[-1].inherited_opens[1]
    assert (record.backing_id, record.open_count) == (6, 1)
    for one in journals:
        one.close(remove=False)


def test_torn_and_foreign_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "open"
    journal = OpenFileJournal(path, discard_existing=True)
    journal.record_open(1, FILE, "", 0)
    journal.close(remove=False)
    with path.open("ab") as file:
        file.write(b'{"r": 5}\n[]\n{"o": 2, "v": {"size": 1}}\n\xff\xfe\n{"o": 3, "v"')
    again = OpenFileJournal(path, discard_existing=False)
    assert set(again.inherited_opens) == {1}
    again.close(remove=True)
    assert not path.exists()


def test_a_fresh_journal_forgets(tmp_path: Path) -> None:
    path = tmp_path / "open"
    journal = OpenFileJournal(path, discard_existing=True)
    journal.record_open(1, FILE, "", 0)
    journal.close(remove=False)
    fresh = OpenFileJournal(path, discard_existing=True)
    assert fresh.inherited_opens == {}
    fresh.close(remove=False)
    assert path.read_bytes() == b""


def test_it_does_not_grow_without_bound(tmp_path: Path) -> None:
    path = tmp_path / "open"
    journal = OpenFileJournal(path, discard_existing=True)
    for _ in range(40_000):
        journal.record_open(1, FILE, "", 0)
        journal.record_release(1)
    assert path.stat().st_size < 5 << 20
    journal.close(remove=True)
