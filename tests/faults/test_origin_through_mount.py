"""An origin that fails in every way, seen by who reads the mount: right bytes, or one clear error in bounded time."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.content import check, content
from tests.support.faulty import FaultyServer, Kind, Request, everything
from tests.support.live import (
    HANG,
    MIB,
    background,
    cached,
    covers,
    dropped,
    in_time,
    is_right,
    spans,
    status,
    wait_cached,
)
from tests.support.mounting import RealMount, command, failing, mounted, needs_fuse, s3_environment
from tests.support.servers import S3Bucket, S3Server, free_port, wait_until

pytestmark = needs_fuse

_SIZE = 6 * MIB + 777
_OPTIONS = {
    "deadline": 12,
    "stall_timeout": 1,
    "connect_timeout": 2,
    "retry_initial": "10ms",
    "retry_max": "100ms",
    "range_size": "2MiB",
    "concurrency": 4,
    "metadata_ttl": 0,
    "negative_ttl": 0,
}


class Place:
    """A bucket behind a proxy that misbehaves, and a mount of it."""

    def __init__(self, bucket: S3Bucket, proxy: FaultyServer, mount: RealMount) -> None:
        self.bucket = bucket
        self.proxy = proxy
        self.mount = mount
        self._names = iter(range(1000))

    def file(self, suffix: str = "dat", version: int = 1) -> Path:
        """A new object; its path."""
        key = f"file-{next(self._names)}.{suffix}"
        self.put(key, version)
        return self.mount.path / key

    def put(self, key: str, version: int, size: int = _SIZE) -> None:
        self.bucket.put(key, content(key, version, 0, size))


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[FaultyServer]:
    """One for the module; cleared before each test."""
    client = s3_server.client()

    def whole(path: str) -> bytes:
        bucket, _, key = path.lstrip("/").partition("/")
        return bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read())

    with FaultyServer(s3_server.endpoint) as server:
        server.fetch_whole_with(whole)
        yield server


@pytest.fixture(autouse=True)
def fresh(proxy: FaultyServer) -> None:
    """No fault of the test before, and its requests forgotten."""
    proxy.clear()
    proxy.reset_counts()


@contextlib.contextmanager
def placed(server: S3Server, proxy: FaultyServer, work: Path, **options: object) -> Iterator[Place]:
    bucket = server.bucket()
    bucket.put("first", b"1")
    env = s3_environment(server, proxy.url)
    with mounted(bucket.url, work, env=env, **(_OPTIONS | options)) as mount:
        yield Place(bucket, proxy, mount)
        proxy.clear()


@pytest.fixture(scope="module")
def place(
    s3_server: S3Server, proxy: FaultyServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """Everything on: prefetch, passthrough."""
    with placed(s3_server, proxy, tmp_path_factory.mktemp("place")) as made:
        yield made


@pytest.fixture(scope="module")
def strict(
    s3_server: S3Server, proxy: FaultyServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """A short deadline, and nothing is fetched but what is asked for."""
    work = tmp_path_factory.mktemp("strict")
    with placed(
        s3_server, proxy, work, deadline=3, prefetch="off", range_size="1MiB", concurrency=16
    ) as made:
        yield made


def opened(path: Path) -> int:
    """Without read-ahead: only what is read is asked for."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    return fd


def pread(fd: int, offset: int, length: int = MIB) -> bytes:
    return in_time(functools.partial(os.pread, dropped(fd), length, offset))


# -- what passes


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 503, "times": 20},
        {"kind": "status", "status": 500, "times": 5},
        {"kind": "status", "status": 429, "times": 5, "headers": {"Retry-After": "0"}},
        {"kind": "stall", "times": 2},
        {"kind": "stall", "after": 700_000, "times": 2},
        {"kind": "truncate", "after": 700_000, "times": 5},
        {"kind": "truncate", "after": 0, "times": 3},
        {"kind": "reset", "times": 5},
        {"kind": "reset", "after": 1_300_000, "times": 5},
        {"kind": "whole", "times": 3},
        {"kind": "ok_range", "times": 3},
        {"kind": "shift", "times": 2},
    ],
    ids=lambda fault: "-".join(str(value) for name, value in fault.items() if name != "headers"),
)
def test_faults_that_pass_are_invisible(place: Place, fault: dict[str, Any]) -> None:
    path = place.file()
    place.proxy.add(**fault, match=lambda request: bool(spans([request], path.name)))
    is_right(path, path.name, _SIZE)
    assert not place.proxy._faults, "the fault was not met as often as it should"


def test_opening_a_shard_does_not_wait_for_a_server_that_stalls(place: Place) -> None:
    path = place.file("safetensors")
    place.proxy.add("stall", times=6, match=lambda request: bool(spans([request], path.name)))
    is_right(path, path.name, _SIZE)


def test_twenty_503_are_counted(place: Place) -> None:
    before = status(place.mount)["origin"]
    path = place.file()
    place.proxy.add("status", status=503, times=20)
    is_right(path, path.name, _SIZE)
    after = status(place.mount)["origin"]
    assert after["throttled"] - before["throttled"] == 20
    assert after["errors"] - before["errors"] >= 20


# -- what does not


@pytest.mark.expected_log("access denied|tried until the deadline")
def test_faults_that_stay_are_one_error_in_time(strict: Place) -> None:
    """All at once, so that the deadlines run beside each other; a file that is well is not affected."""
    faults: list[tuple[dict[str, Any], str]] = [
        ({"kind": "status", "status": 503}, "EIO"),
        ({"kind": "stall"}, "EIO"),
        ({"kind": "stall", "after": 10}, "EIO"),
        ({"kind": "truncate", "after": 0}, "EIO"),
        ({"kind": "reset"}, "EIO"),
        ({"kind": "status", "status": 403}, "EACCES"),
    ]
    paths = [strict.file() for _ in faults]
    well = strict.file()
    for path, (fault, _) in zip(paths, faults, strict=True):
        strict.proxy.add(
            **fault, times=math.inf, match=lambda request, key=path.name: bool(spans([request], key))
        )
    fds = [opened(path) for path in (*paths, well)]
    readers = [
        background(functools.partial(failing, functools.partial(os.pread, fd, 10, 0))) for fd in fds[:-1]
    ]
    check(pread(fds[-1], 0), well.name, 1)
    assert [reader.result(HANG) for reader in readers] == [name for _, name in faults]
    strict.proxy.clear()
    for path, fd in zip(paths, fds, strict=False):  # the failure is not remembered
        check(pread(fd, MIB), path.name, 1, MIB)
    for fd in fds:
        os.close(fd)


def test_objects_that_are_throttled_or_stall_for_good_do_not_stop_the_others(strict: Place) -> None:
    """The fewest slots that throttling leaves are enough for who comes later."""
    stuck = [strict.file() for _ in range(7)]
    denied, well = strict.file(), strict.file()
    faults: list[Kind] = ["status", "stall", "stall", "stall", "stall", "stall", "stall"]
    for path, fault in zip(stuck, faults, strict=True):
        strict.proxy.add(
            fault, times=math.inf, match=lambda request, key=path.name: bool(spans([request], key))
        )
    strict.proxy.add(
        "status", status=403, times=math.inf, match=lambda request: bool(spans([request], denied.name))
    )
    fds = [opened(path) for path in (*stuck, denied, well)]
    readers = [
        background(functools.partial(failing, functools.partial(os.pread, fd, 10, 0))) for fd in fds[:7]
    ]
    wait_until(lambda: status(strict.mount)["origin"]["concurrency"] <= 4, "the origin throttles")
    assert failing(lambda: pread(fds[7], 0, 10)) == "EACCES"
    check(pread(fds[8], 0), well.name, 1)
    assert [reader.result(HANG) for reader in readers] == ["EIO"] * 7
    for fd in fds:
        os.close(fd)


def test_a_file_that_was_cut_short_in_the_middle_keeps_what_came(strict: Place) -> None:
    path = strict.file()
    fd = opened(path)
    check(pread(fd, 0), path.name, 1)
    strict.proxy.add("truncate", times=math.inf, after=100_000, match=covers(path.name, 3 * MIB))
    strict.proxy.add("status", times=math.inf, match=covers(path.name, 4 * MIB + 100))
    assert failing(lambda: pread(fd, 4 * MIB + 100, 10)) == "EIO"
    check(pread(fd, 0), path.name, 1)
    check(pread(fd, 2 * MIB), path.name, 1, 2 * MIB)
    os.close(fd)


# -- other versions


@pytest.mark.parametrize("size", [_SIZE, 3 * MIB, 9 * MIB], ids=["same", "smaller", "larger"])
def test_an_object_that_was_overwritten(strict: Place, size: int) -> None:
    path = strict.file()
    fd = opened(path)
    check(pread(fd, 0), path.name, 1)
    strict.put(path.name, 2, size)
    assert failing(lambda: pread(fd, 4 * MIB)) == "ESTALE"
    check(pread(fd, 0), path.name, 1)
    assert os.fstat(fd).st_size == _SIZE
    is_right(path, path.name, size, 2)
    assert path.stat().st_size == size
    assert failing(lambda: pread(fd, 4 * MIB)) == "ESTALE"
    os.close(fd)


def test_an_object_that_is_overwritten_while_it_is_fetched(place: Place) -> None:
    path = place.file()
    place.proxy.before(
        lambda: place.put(path.name, 2), nth=3, match=lambda request: bool(spans([request], path.name))
    )
    fd = opened(path)
    read = 0
    stale = ""
    while read < _SIZE and not stale:
        try:
            data = pread(fd, read, 50_000)
        except OSError as error:
            stale = errno.errorcode[error.errno or 0]
        else:
            check(data, path.name, 1, read)
            read += len(data)
    assert stale in ("", "ESTALE")
    is_right(path, path.name, _SIZE, 2)
    os.close(fd)


def test_an_object_that_is_deleted_while_it_is_read(strict: Place) -> None:
    path = strict.file()
    fd = opened(path)
    check(pread(fd, 0), path.name, 1)
    strict.bucket.delete(path.name)
    assert failing(lambda: pread(fd, 4 * MIB)) == "ESTALE"
    check(pread(fd, 0), path.name, 1)
    assert failing(lambda: os.open(path, os.O_RDONLY)) == "ENOENT"
    assert path.name not in os.listdir(strict.mount.path)
    os.close(fd)


def test_the_next_open_has_the_new_version_without_waiting_for_the_listing(
    s3_server: S3Server, proxy: FaultyServer, tmp_path: Path
) -> None:
    options = {"metadata_ttl": "1h", "negative_ttl": "1h", "prefetch": "off", "range_size": "1MiB"}
    bucket = s3_server.bucket()
    for key in ("changed.dat", "deleted.dat"):
        bucket.put(key, content(key, 1, 0, _SIZE))
    env = s3_environment(s3_server, proxy.url)
    with mounted(bucket.url, tmp_path, env=env, **(_OPTIONS | options)) as mount:
        fds = {key: opened(mount.path / key) for key in ("changed.dat", "deleted.dat")}
        for key, fd in fds.items():
            check(pread(fd, 0), key, 1)
        bucket.put("changed.dat", content("changed.dat", 2, 0, 2 * MIB))
        bucket.delete("deleted.dat")
        for fd in fds.values():
            assert failing(lambda fd=fd: pread(fd, 4 * MIB)) == "ESTALE"  # type: ignore[misc]
        wait_until(lambda: (mount.path / "changed.dat").stat().st_size == 2 * MIB, "the new version", HANG)
        is_right(mount.path / "changed.dat", "changed.dat", 2 * MIB, 2)
        wait_until(lambda: not (mount.path / "deleted.dat").exists(), "the end of the deleted object", HANG)
        for fd in fds.values():
            os.close(fd)


# -- outages


@pytest.mark.expected_log("tried until the deadline")
def test_an_outage_is_invisible_for_what_is_cached(
    s3_server: S3Server, proxy: FaultyServer, tmp_path: Path
) -> None:
    bucket = s3_server.bucket()
    for key in ("a/kept.dat", "a/missing.dat"):
        bucket.put(key, content(key, 1, 0, _SIZE))
    env = s3_environment(s3_server, proxy.url)
    options = _OPTIONS | {"deadline": 2, "metadata_ttl": 60}
    with mounted(bucket.url, tmp_path, env=env, **options) as mount:
        kept, missing = mount.path / "a/kept.dat", mount.path / "a/missing.dat"
        is_right(kept, "a/kept.dat", _SIZE)
        wait_cached(kept, _SIZE)
        fd = opened(kept)
        proxy.outage()
        check(pread(fd, 0, _SIZE), "a/kept.dat", 1)
        is_right(kept, "a/kept.dat", _SIZE)
        assert sorted(os.listdir(mount.path / "a")) == ["kept.dat", "missing.dat"]
        assert failing(lambda: in_time(missing.read_bytes)) == "EIO"
        os.close(fd)
    with mounted(bucket.url, tmp_path, env=env, **options) as mount:  # the tree of the last mount
        is_right(kept, "a/kept.dat", _SIZE)
        assert failing(lambda: in_time(missing.read_bytes)) == "EIO"
        proxy.clear()
        is_right(missing, "a/missing.dat", _SIZE)


# -- at the mount


def refused(source: str, work: Path, env: dict[str, str], *secrets: str) -> str:
    """The message of `fusecache mount`; nothing of it, nor of the log, is a traceback or a secret."""
    (work / "mnt").mkdir()
    options = f"cache_dir={work}/cache,runtime_dir={work}/run,deadline=2,stall_timeout=1,connect_timeout=1"
    done = in_time(
        lambda: command("mount", source, str(work / "mnt"), "-o", options, env=env, check=False), 2 * HANG
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("fusecache: ")
    assert done.stderr.count("\n") == 1, done.stderr
    logs = "".join(log.read_text() for log in (work / "run").glob("*/log"))
    for text in (done.stderr, logs):
        assert "Traceback" not in text
        for secret in secrets:
            assert secret not in text
    assert not os.path.ismount(work / "mnt")
    return done.stderr


def test_mounting_with_wrong_credentials(
    s3_server: S3Server, shared_bucket: S3Bucket, tmp_path: Path
) -> None:
    env = s3_environment(s3_server) | {"AWS_SECRET_ACCESS_KEY": "wrong-and-still-secret"}
    said = refused(shared_bucket.url, tmp_path, env, "wrong-and-still-secret")
    assert "access denied" in said
    assert "check the credentials" in said


def test_mounting_a_missing_bucket(s3_server: S3Server, tmp_path: Path) -> None:
    said = refused("s3://no-such-bucket-here", tmp_path, s3_environment(s3_server), s3_server.secret_key)
    assert "no-such-bucket-here" in said
    assert "does not exist" in said


def test_mounting_from_an_endpoint_that_nobody_listens_on(s3_server: S3Server, tmp_path: Path) -> None:
    env = s3_environment(s3_server, f"http://127.0.0.1:{free_port()}")
    said = refused("s3://bucket", tmp_path, env, s3_server.secret_key)
    assert "s3://bucket" in said


@pytest.mark.parametrize("how", ["silent", "stalls"])
def test_mounting_from_an_endpoint_that_stalls(
    s3_server: S3Server, proxy: FaultyServer, tmp_path: Path, how: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy.add("stall", times=math.inf, match=everything)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}" if how == "silent" else proxy.url
        said = refused("s3://bucket", tmp_path, s3_environment(s3_server, url), s3_server.secret_key)
    assert "s3://bucket" in said


# -- what is fetched unasked


@pytest.fixture
def model(s3_bucket: S3Bucket) -> S3Bucket:
    """Four shards whose order is that of the index, and not that of their names."""
    for key in ("m/b.safetensors", "m/d.safetensors", "m/a.safetensors", "m/c.safetensors"):
        s3_bucket.put(key, content(key, 1, 0, 2 * MIB))
    weights = {"w1": "d.safetensors", "w2": "b.safetensors", "w3": "c.safetensors", "w4": "a.safetensors"}
    s3_bucket.put("m/model.safetensors.index.json", json.dumps({"weight_map": weights}).encode())
    s3_bucket.put("m/other.txt", b"not asked for")
    return s3_bucket


def _complete(mount: RealMount) -> set[str]:
    found = json.loads(mount.command("ls", str(mount.path), "--json").stdout)
    return {item["path"] for item in found if item["complete"]}


def _order(seen: list[Request]) -> list[str]:
    """The shards in the order of their first requests."""
    names = [request.path.rpartition("/")[2] for request in seen if request.kind == "RANGE"]
    return [name for name in dict.fromkeys(names) if name.endswith(".safetensors")]


def test_the_first_read_fetches_the_file_and_then_the_others_in_the_order_of_the_index(
    model: S3Bucket, proxy: FaultyServer, tmp_path: Path
) -> None:
    env = s3_environment(model.server, proxy.url)
    shards = {f"m/{name}.safetensors" for name in "abcd"}
    with mounted(model.url, tmp_path, env=env, concurrency=1) as mount:
        with open(mount.path / "m/b.safetensors", "rb") as file:
            assert file.read(1) == content("m/b.safetensors", 1, 0, 1)
        wait_until(lambda: shards <= _complete(mount), "all shards", HANG)
        assert _order(proxy.seen) == [f"{name}.safetensors" for name in "bcad"]
        assert "m/other.txt" not in _complete(mount)
        found = status(mount)
        assert found["bytes"]["origin"] >= 8 * MIB
        assert found["loader"]["bytes_to_fetch"] == 0
        assert found["cache"]["objects_complete"] == 5
        for key in shards:
            is_right(mount.path / key, key, 2 * MIB)


def test_the_budget_ends_it(model: S3Bucket, proxy: FaultyServer, tmp_path: Path) -> None:
    env = s3_environment(model.server, proxy.url)
    with mounted(model.url, tmp_path, env=env, prefetch_budget="5MiB", concurrency=2) as mount:
        is_right(mount.path / "m/d.safetensors", "m/d.safetensors", 2 * MIB)
        wanted = {f"m/{name}.safetensors" for name in "dbc"}
        wait_until(lambda: wanted <= _complete(mount), "the shards of the budget", HANG)
        assert _order(proxy.seen) == [f"{name}.safetensors" for name in "dbc"]


def test_prefetch_off_fetches_what_is_read(model: S3Bucket, proxy: FaultyServer, tmp_path: Path) -> None:
    env = s3_environment(model.server, proxy.url)
    with mounted(model.url, tmp_path, env=env, prefetch="off", range_size="1MiB") as mount:
        path = mount.path / "m/b.safetensors"
        fd = opened(path)
        assert pread(fd, MIB + 5, 10) == content("m/b.safetensors", 1, MIB + 5, 10)
        os.close(fd)
        assert cached(path) == MIB
        assert spans(proxy.seen, "b.safetensors") == [(MIB, 2 * MIB)]
        assert _order(proxy.seen) == ["b.safetensors"]
