"""The promises of an origin, checked for every implementation and engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fusecache.errors import CancelledReadError, NotFoundError, UnavailableError, VersionChangedError
from fusecache.types import ObjectVersion
from tests.support.content import check, content
from tests.support.faulty import FaultyServer
from tests.support.origins import (
    Place,
    file_place,
    gcs_place,
    http_place,
    memory_place,
    read,
    s3_place,
)

KINDS = (
    "memory",
    "file",
    "http",
    "seaweedfs-auto",
    "seaweedfs-obstore",
    "seaweedfs-fsspec",
    "moto-auto",
    "moto-obstore",
    "moto-fsspec",
    "gcs-obstore",
    "gcs-fsspec",
)
BIG = 5 * 1024 * 1024 + 123


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    kind, _, engine = str(request.param).partition("-")
    if kind == "memory":
        manager = memory_place()
    elif kind == "file":
        manager = file_place(tmp_path / "root")
    elif kind == "http":
        faulty: FaultyServer = request.getfixturevalue("faulty_http")
        manager = http_place(faulty.url, faulty.objects)
    elif kind == "gcs":
        manager = gcs_place(request.getfixturevalue("gcs_server").bucket(), engine)
    else:
        shared = kind == "seaweedfs"
        bucket = request.getfixturevalue("shared_bucket" if shared else "moto_server")
        manager = s3_place(bucket if shared else bucket.bucket(), engine)
    with manager as made:
        yield made


def listed(place: Place) -> dict[str, ObjectVersion]:
    return {version.key: version for version in place.origin.list_objects() if version.key != ".keep"}


def test_a_listing_has_every_object_with_its_version(place: Place) -> None:
    keys = ["a", "dir/b", "dir/sub/c d", "dir/ü+%20&=?#~'.bin", "empty"]
    for number, key in enumerate(keys):
        place.put(key, content(key, 1, 0, 0 if key == "empty" else 100 + number))
    found = listed(place)
    assert sorted(found) == sorted(keys)
    for number, key in enumerate(keys):
        assert found[key].size == (0 if key == "empty" else 100 + number)
        assert found[key].origin == place.origin.identity
        assert place.origin.stat_object(key) == found[key]
        if key != "empty":
            check(read(place.origin, found[key]), key, 1)
    assert read(place.origin, found["empty"]) == b""
    assert place.origin.stats.lists == 1


def test_any_range_is_exact(place: Place) -> None:
    place.put("big", content("big", 1, 0, BIG))
    version = place.origin.stat_object("big")
    for offset, length in ((0, BIG), (0, 1), (BIG - 1, 1), (1000, 2_500_000), (BIG, 0), (4096, 4096)):
        data = read(place.origin, version, offset, length)
        assert len(data) == length
        check(data, "big", 1, offset)
    for offset, length in ((0, BIG + 1), (-1, 2), (BIG, 1), (5, -1)):
        with pytest.raises(ValueError, match="not in an object"):
            place.origin.read_range(version, offset, length)


def test_many_threads_read_at_once(place: Place) -> None:
    place.put("big", content("big", 1, 0, BIG))
    version = place.origin.stat_object("big")

    def one(number: int) -> None:
        offset = number * 200_000
        check(read(place.origin, version, offset, 300_000), "big", 1, offset)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(one, range(24)))
    assert place.origin.stats.bytes == 24 * 300_000


def test_an_overwritten_object_is_another_version(place: Place) -> None:
    place.put("a", content("a", 1, 0, 50_000))
    old = place.origin.stat_object("a")
    place.put("a", content("a", 2, 0, 50_000))
    with pytest.raises(VersionChangedError, match=r"a: was replaced"):
        read(place.origin, old)
    new = place.origin.stat_object("a")
    assert new != old
    assert new.id != old.id
    check(read(place.origin, new), "a", 2)


def test_a_shrunk_object_is_another_version(place: Place) -> None:
    place.put("a", content("a", 1, 0, 50_000))
    old = place.origin.stat_object("a")
    place.put("a", content("a", 2, 0, 10))
    with pytest.raises(VersionChangedError):
        read(place.origin, old, 40_000, 5_000)


def test_what_is_deleted_is_not_found(place: Place) -> None:
    place.put("keep", b"x")
    place.put("a", b"hello")
    version = place.origin.stat_object("a")
    place.delete("a")
    with pytest.raises(NotFoundError, match="a: "):
        place.origin.stat_object("a")
    with pytest.raises(NotFoundError):
        read(place.origin, version)
    assert "a" not in listed(place)


def test_without_metadata_there_is_no_sha256(place: Place) -> None:
    place.put("a", b"hello")
    assert place.origin.read_metadata_sha256(place.origin.stat_object("a")) is None


def test_a_reader_can_stop_and_be_stopped(place: Place) -> None:
    place.put("big", content("big", 1, 0, BIG))
    version = place.origin.stat_object("big")
    chunks = place.origin.read_range(version, 0, BIG)
    check(next(chunks), "big", 1)
    chunks.close()  # type: ignore[attr-defined]
    gone = threading.Event()
    chunks = place.origin.read_range(version, 0, BIG, cancelled=gone.is_set)
    next(chunks)
    gone.set()
    with pytest.raises(CancelledReadError):
        list(chunks)
    # The slots are free again, and so are the connections.
    check(read(place.origin, version), "big", 1)


def test_a_deadline_in_the_past_is_an_outage(place: Place) -> None:
    place.put("big", content("big", 1, 0, BIG))
    version = place.origin.stat_object("big")
    with pytest.raises(UnavailableError):
        read(place.origin, version, deadline=0.0)
