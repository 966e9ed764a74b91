"""What a restarted daemon finds out about the files that are open."""

from __future__ import annotations

from pathlib import Path

from fusecache.mount.journal import Journal
from fusecache.types import ObjectVersion

FILE = ObjectVersion("s3://b", "k\udc80/ü", "e", 10, 5)


def test_open_files_are_inherited(tmp_path: Path) -> None:
    path = tmp_path / "open"
    first = Journal(path, fresh=True)
    first.opened(1, FILE, "src", 0)
    first.opened(1, FILE, "src", 0)
    first.opened(2, FILE, "src", 9)
    first.opened(3, FILE, "src", 0)
    first.released(3)
    first.released(1)
    first.released(77)
    second = Journal(path, fresh=False)
    found = {nodeid: (r.version, r.source, r.backing, r.count) for nodeid, r in second.inherited.items()}
    assert found == {1: (FILE, "src", 0, 1), 2: (FILE, "src", 9, 1)}
    assert next(iter(second.inherited.values())).version.id == FILE.id
    second.released(1)
    third = Journal(path, fresh=False)
    assert set(third.inherited) == {2}
    for journal in (first, second, third):
        journal.close(remove=False)


def test_torn_and_foreign_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "open"
    journal = Journal(path, fresh=True)
    journal.opened(1, FILE, "", 0)
    journal.close(remove=False)
    with path.open("ab") as file:
        file.write(b'{"r": 5}\n[]\n{"o": 2, "v": {"size": 1}}\n\xff\xfe\n{"o": 3, "v"')
    again = Journal(path, fresh=False)
    assert set(again.inherited) == {1}
    again.close(remove=True)
    assert not path.exists()


def test_a_fresh_journal_forgets(tmp_path: Path) -> None:
    path = tmp_path / "open"
    journal = Journal(path, fresh=True)
    journal.opened(1, FILE, "", 0)
    journal.close(remove=False)
    fresh = Journal(path, fresh=True)
    assert fresh.inherited == {}
    fresh.close(remove=False)
    assert path.read_bytes() == b""


def test_it_does_not_grow_without_bound(tmp_path: Path) -> None:
    path = tmp_path / "open"
    journal = Journal(path, fresh=True)
    for _ in range(40_000):
        journal.opened(1, FILE, "", 0)
        journal.released(1)
    assert path.stat().st_size < 5 << 20
    journal.close(remove=True)
