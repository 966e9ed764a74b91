"""The index of object versions: JSON in diskcache, and nothing else gets out of it."""

from __future__ import annotations

import json
import os
import pickle
import sqlite3
from contextlib import closing
from pathlib import Path

import diskcache
import pytest

from fusecache.store.index import JsonDisk, ObjectIndex, record_to_json
from fusecache.store.records import ObjectRecord
from fusecache.store.store import Store
from fusecache.types import ObjectId, ObjectVersion


def record(key: str = "k", last_use_ns: int = 5) -> ObjectRecord:
    version = ObjectVersion("mem://b", key, "e", 4096, 1)
    return ObjectRecord(version, 4096, 4096, 8192, False, last_use_ns, 2, True)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    index = ObjectIndex(tmp_path / "index")
    index.save_changes([(record().version.id, record())], [])
    index.close()
    return tmp_path / "index"


def load(directory: Path) -> dict[ObjectId, ObjectRecord]:
    index = ObjectIndex(directory)
    try:
        return dict(index.load_records()[0])
    finally:
        index.close()


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_records_and_order_are_kept(directory: Path) -> None:
    index = ObjectIndex(directory)
    newer = record("newer", 9)
    index.save_changes([(newer.version.id, newer)], [])
    index.save_order([newer.version.id, record().version.id], [(ObjectId("gone"), 7)])
    index.close()
    index = ObjectIndex(directory)
    records, ghosts = index.load_records()
    index.close()
    assert records == [(newer.version.id, newer), (record().version.id, record())]
    assert ghosts == [("gone", 7)]


def test_dropped_records_are_gone(directory: Path) -> None:
    index = ObjectIndex(directory)
    index.save_changes([], [record().version.id])
    index.close()
    assert load(directory) == {}


def test_no_value_is_a_pickle(directory: Path) -> None:
    with closing(sqlite3.connect(directory / "cache.db")) as database:
        rows = database.execute("SELECT mode, filename, value FROM Cache").fetchall()
    assert [(mode, filename) for mode, filename, _ in rows] == [(1, None)]
    assert rows[0][2].startswith('{"version":{"origin":"mem://b"')


@pytest.mark.parametrize("place", ["value", "key", "file", "setting"])
def test_a_hostile_pickle_in_the_index_is_not_run(directory: Path, tmp_path: Path, place: str) -> None:
    target = tmp_path / "pwned"
    data = pickle.dumps(Hostile(target))
    with closing(sqlite3.connect(directory / "cache.db")) as database:
        if place == "value":
            database.execute("UPDATE Cache SET mode = 4, value = ?", (sqlite3.Binary(data),))
        elif place == "key":
            database.execute("UPDATE Cache SET raw = 0, key = ?", (sqlite3.Binary(data),))
        elif place == "file":
            (directory / "evil.val").write_bytes(data)
            database.execute("UPDATE Cache SET mode = 4, value = NULL, filename = 'evil.val'")
        else:
            database.execute("UPDATE Settings SET value = ? WHERE key = 'disk_pickle_protocol'", (data,))
        database.commit()
    if place != "setting":  # the attack is a real one: diskcache's own disk falls for it
        with diskcache.Cache(str(directory)) as plain:
            list(map(plain.get, plain))
        assert target.exists()
        target.rmdir()
    load(directory)
    assert not target.exists()


def test_a_store_on_a_hostile_index_works_from_its_files(tmp_path: Path) -> None:
    with Store(tmp_path / "cache", limit=1 << 20, free_floor=0, block_size=4096) as store:
        stored = store.open(record().version)
        assert stored.reserve_bytes(4096)
        stored.write(0, bytes(4096))
        stored.commit_block(0, 1)
        stored.close()
    data = pickle.dumps(Hostile(tmp_path / "pwned"))
    with closing(sqlite3.connect(tmp_path / "cache" / "index" / "cache.db")) as database:
        database.execute("UPDATE Cache SET mode = 4, value = ?", (sqlite3.Binary(data),))
        database.commit()
    with Store(tmp_path / "cache", limit=1 << 20, free_floor=0, block_size=4096) as store:
        assert store.wait_for_scan(30)
        assert [info.version for info in store.objects()] == [record().version]
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("junk", [b"", b"not a database" * 1000, b"SQLite format 3\0" + bytes(5000)])
def test_a_broken_database_is_made_anew(directory: Path, junk: bytes) -> None:
    for path in directory.iterdir():
        path.unlink()
    (directory / "cache.db").write_bytes(junk)
    assert load(directory) == {}
    index = ObjectIndex(directory)
    index.save_changes([(record().version.id, record())], [])
    index.close()
    assert load(directory) == {record().version.id: record()}


@pytest.mark.parametrize(
    "value",
    [
        "[]",
        "null",
        "{}",
        "17",
        '{"version":null}',
        '{"version":{"origin":1}}',
        '{"version":{"origin":"","key":"","etag":"","size":"x","mtime_ns":0}}',
        "{",
        '{"version":{"origin":"mem://b","key":"k","etag":"e","size":4096,"mtime_ns":1},"present_bytes":"many"}',
    ],
)
def test_values_that_are_no_records_are_passed_over(directory: Path, value: str) -> None:
    with closing(sqlite3.connect(directory / "cache.db")) as database:
        database.execute("UPDATE Cache SET value = ?", (value,))
        database.commit()
    assert load(directory) == {}


@pytest.mark.parametrize(
    "field", ["present_bytes", "stored_bytes", "last_use_ns", "accesses", "complete", "size"]
)
def test_a_record_with_a_field_of_a_wrong_type_is_passed_over(directory: Path, field: str) -> None:
    value = record_to_json(record())
    (value["version"] if field == "size" else value)[field] = "4096"
    with closing(sqlite3.connect(directory / "cache.db")) as database:
        database.execute("UPDATE Cache SET value = ?", (json.dumps(value),))
        database.commit()
    assert load(directory) == {}


def test_the_disk_refuses_what_is_not_json_text() -> None:
    disk = JsonDisk.__new__(JsonDisk)
    with pytest.raises(ValueError, match="text"):
        disk.put(b"key")
    with pytest.raises(ValueError, match="text"):
        disk.get(b"key", True)
    with pytest.raises(ValueError, match="JSON"):
        disk.fetch(4, None, b"", False)


def test_an_index_that_cannot_be_made_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    index = ObjectIndex(tmp_path / "file" / "index")
    index.save_changes([(record().version.id, record())], [])
    assert index.load_records() == ([], [])
    index.close()
