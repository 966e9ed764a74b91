"""Large directories, several sources, changes at the origin, and outages, on a real mount."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.faulty import FaultyServer
from tests.support.live import HANG
from tests.support.mounting import command, failing, mounted, needs_fuse, s3_environment
from tests.support.servers import S3Bucket, S3Server, wait_until

pytestmark = needs_fuse


def test_a_recursive_listing_costs_one_list_request_per_thousand_objects(
    s3_bucket: S3Bucket, faulty_s3: FaultyServer, tmp_path: Path
) -> None:
    count = 2500
    with ThreadPoolExecutor(16) as pool:
        list(
            pool.map(
                lambda number: s3_bucket.put(f"d{number % 3}/{number}", b"x" * (number % 7)), range(count)
            )
        )
    faulty_s3.reset_counts()
    with mounted(s3_bucket.url, tmp_path, env=s3_environment(s3_bucket.server, faulty_s3.url)) as mount:
        for _ in range(2):
            sizes = {
                os.path.join(top, name): os.stat(os.path.join(top, name)).st_size
                for top, _, names in os.walk(mount.path)
                for name in names
            }
            assert len(sizes) == count
            assert sizes[str(mount.path / "d1/13")] == 13 % 7
        assert faulty_s3.count("LIST") == math.ceil(count / 1000)
        assert faulty_s3.count("HEAD") == 0


def test_a_directory_of_a_hundred_thousand_files(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    (origin / "many").mkdir(parents=True)
    # hard links: a hundred thousand inodes would cost more than the test; ext4 allows 65,000 to one
    for half in range(2):
        first = origin / f"many/{half}-00000"
        first.write_bytes(b"x")
        for number in range(1, 50_000):
            os.link(first, origin / f"many/{half}-{number:05d}")
    expected = set(os.listdir(origin / "many"))
    assert len(expected) == 100_000
    with mounted(f"file://{origin}", tmp_path) as mount:
        assert set(os.listdir(mount.path / "many")) == expected
        with os.scandir(mount.path / "many") as found:
            assert sum(entry.stat().st_size for entry in found) == len(expected)
        assert (mount.path / "many/1-00001").read_bytes() == b"x"


@pytest.mark.expected_log("the bucket does not exist")
def test_several_sources_under_one_mount(s3_bucket: S3Bucket, tmp_path: Path) -> None:
    s3_bucket.put("a/b", b"from the bucket")
    local = tmp_path / "local"
    local.mkdir()
    (local / "c").write_bytes(b"from a directory")
    settings = tmp_path / "fusecache.toml"
    settings.write_text(
        f'[[source]]\nname = "remote"\nurl = "{s3_bucket.url}"\n'
        f'[[source]]\nname = "near"\nurl = "file://{local}"\n'
        f'[[source]]\nname = "missing"\nurl = "s3://{s3_bucket.name}-missing"\n'
    )
    with mounted("none", tmp_path, env=s3_environment(s3_bucket.server), config=settings) as mount:
        assert sorted(os.listdir(mount.path)) == ["missing", "near", "remote"]
        assert (mount.path / "remote/a/b").read_bytes() == b"from the bucket"
        assert (mount.path / "near/c").read_bytes() == b"from a directory"
        assert os.getxattr(mount.path / "near", "user.fusecache.source").startswith(b"file://")
        assert failing(lambda: os.listdir(mount.path / "missing")) == "ENOENT"
        assert failing(lambda: os.stat(mount.path / "missing/x")) == "ENOENT"
        assert (
            len({os.stat(mount.path / name).st_ino for name in ("near", "remote", "missing", "near/c")}) == 4
        )


def test_changes_at_the_origin_are_seen_after_a_refresh(s3_bucket: S3Bucket, tmp_path: Path) -> None:
    s3_bucket.put("d/changed", b"old")
    s3_bucket.put("d/removed", b"gone")
    with mounted(
        s3_bucket.url, tmp_path, env=s3_environment(s3_bucket.server), metadata_ttl=3600, negative_ttl=3600
    ) as mount:
        at = mount.path / "d"
        held = open(at / "changed", "rb")  # noqa: SIM115
        gone = open(at / "removed", "rb")  # noqa: SIM115
        with held, gone:
            assert (held.read(), gone.read()) == (b"old", b"gone")
            assert not (at / "added").exists()
            s3_bucket.put("d/changed", b"newer")
            s3_bucket.delete("d/removed")
            s3_bucket.put("d/added", b"added")
            assert (at / "changed").read_bytes() == b"old"
            assert not (at / "added").exists()
            mount.command("refresh", str(mount.path))
            wait_until((at / "added").exists, "the new object", HANG)
            wait_until(lambda: not (at / "removed").exists(), "the end of the deleted object", HANG)
            wait_until(lambda: (at / "changed").read_bytes() == b"newer", "the new content", HANG)
            assert sorted(os.listdir(at)) == ["added", "changed"]
            assert (at / "changed").stat().st_size == 5
            held.seek(0)
            assert held.read() == b"old"
            assert os.fstat(held.fileno()).st_size == 3
            assert os.fstat(gone.fileno()).st_size == 4


def test_a_version_that_is_gone_at_the_origin_is_estale_and_the_next_open_is_the_new_one(
    s3_bucket: S3Bucket, tmp_path: Path
) -> None:
    s3_bucket.put("a", b"old" * 100)
    with mounted(
        s3_bucket.url, tmp_path, env=s3_environment(s3_bucket.server), metadata_ttl=3600, negative_ttl=3600
    ) as mount:
        held = os.open(mount.path / "a", os.O_RDONLY)
        try:
            s3_bucket.put("a", b"newer" * 100)
            assert failing(lambda: os.read(held, 10)) == "ESTALE"
            assert (mount.path / "a").read_bytes() == b"newer" * 100
        finally:
            os.close(held)


def test_an_object_that_is_deleted_at_the_origin_is_estale_and_then_absent(
    s3_bucket: S3Bucket, tmp_path: Path
) -> None:
    s3_bucket.put("a", b"old" * 100)
    with mounted(
        s3_bucket.url, tmp_path, env=s3_environment(s3_bucket.server), metadata_ttl=3600, negative_ttl=3600
    ) as mount:
        held = os.open(mount.path / "a", os.O_RDONLY)
        try:
            s3_bucket.delete("a")
            assert failing(lambda: os.read(held, 10)) == "ESTALE"
            assert failing(lambda: os.open(mount.path / "a", os.O_RDONLY)) == "ENOENT"
            wait_until(lambda: not (mount.path / "a").exists(), "the end of the deleted object", HANG)
        finally:
            os.close(held)


@pytest.mark.expected_log("tried until the deadline")
def test_a_mount_made_during_an_outage_has_names_and_cached_bytes(
    s3_bucket: S3Bucket, faulty_s3: FaultyServer, tmp_path: Path
) -> None:
    s3_bucket.put("cached", b"in the cache")
    s3_bucket.put("absent", b"not in the cache")
    env = s3_environment(s3_bucket.server, faulty_s3.url)
    with mounted(s3_bucket.url, tmp_path, env=env, prefetch="off") as mount:
        assert (mount.path / "cached").read_bytes() == b"in the cache"
    faulty_s3.outage()
    with mounted(s3_bucket.url, tmp_path, env=env, deadline="3s", prefetch="off") as mount:
        assert sorted(os.listdir(mount.path)) == ["absent", "cached"]
        assert (mount.path / "absent").stat().st_size == 16
        assert (mount.path / "cached").read_bytes() == b"in the cache"
        assert failing(lambda: (mount.path / "absent").read_bytes()) == "EIO"


def test_a_bucket_that_does_not_exist_is_an_error_of_the_mount(s3_server: S3Server, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    done = command(
        "mount",
        "s3://no-such-bucket-here",
        str(tmp_path / "mnt"),
        "-o",
        f"cache_dir={tmp_path / 'cache'},runtime_dir={tmp_path / 'run'}",
        env=s3_environment(s3_server),
        check=False,
    )
    assert done.returncode != 0
    assert "no-such-bucket-here" in done.stderr
    assert "Traceback" not in done.stderr
    assert not os.path.ismount(tmp_path / "mnt")
