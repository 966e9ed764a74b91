"""Where objects are kept: on the disk, in memory, or some here and some there, through real mounts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.content import content
from tests.support.live import HANG, MIB, is_right, kill_daemon, status
from tests.support.mounting import RealMount, mounted, needs_fuse, tmpfs
from tests.support.servers import wait_until

pytestmark = needs_fuse

SIZE = 6 * MIB + 4321
SHARDS = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
CONFIG = "config.json"
OPTIONS: dict[str, object] = {"block_size": "256KiB", "range_size": "1MiB", "metadata_ttl": "1h"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model of three shards and a config."""
    directory = tmp_path / "source"
    directory.mkdir()
    for key in SHARDS:
        (directory / key).write_bytes(content(key, 1, 0, SIZE))
    (directory / CONFIG).write_bytes(content(CONFIG, 1, 0, 777))
    return directory


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    with tmpfs(tmp_path / "memory", 64) as path:
        yield path


def sizes_in(directory: Path) -> set[int]:
    """Sizes of the objects below."""
    return {path.stat().st_size for path in directory.rglob("*.data")}


def passes(mount: RealMount) -> bool:
    wait_until(lambda: status(mount)["mode"]["why"] != "", "a mode", HANG)
    return bool(status(mount)["mode"]["now"] == "passthrough")


def test_without_a_disk_all_goes_through_memory(source: Path, memory: Path, tmp_path: Path) -> None:
    with mounted(
        f"file://{source}", tmp_path, **OPTIONS, store="off", memory_dir=memory, memory_size="48MiB"
    ) as mount:
        for key in SHARDS:
            is_right(mount.path / key, key, SIZE)
        is_right(mount.path / CONFIG, CONFIG, 777)
        (place,) = memory.iterdir()
        assert place.stat().st_mode & 0o777 == 0o700
        assert sizes_in(place) == {SIZE, 777}
        assert not sizes_in(tmp_path / "cache")
        cache = status(mount)["cache"]
        assert cache["dir"] == str(place)
        assert cache["used"] == cache["memory_used"] > 3 * SIZE
        shown = mount.command("status", str(mount.path)).stdout
        assert "memory" in shown
        assert str(place) in shown
        if passes(mount):
            before = status(mount)["opens"]["passthrough"]
            for key in SHARDS:
                is_right(mount.path / key, key, SIZE)
            assert status(mount)["opens"]["passthrough"] == before + 3
    assert not list(memory.iterdir())
    assert (tmp_path / "cache" / "listings").is_dir()


def test_a_model_larger_than_the_memory_is_read_all_the_same(
    source: Path, memory: Path, tmp_path: Path
) -> None:
    with mounted(
        f"file://{source}", tmp_path, **OPTIONS, store="off", memory_dir=memory, memory_size="8MiB"
    ) as mount:
        for _ in range(2):
            for key in SHARDS:
                is_right(mount.path / key, key, SIZE)
        assert status(mount)["cache"]["used"] <= 8 * MIB


def test_small_files_are_kept_on_the_disk_and_weights_in_memory(
    source: Path, memory: Path, tmp_path: Path
) -> None:
    options = {
        **OPTIONS,
        "store": "small",
        "small_size": "1MiB",
        "memory_dir": memory,
        "memory_size": "48MiB",
    }
    with mounted(f"file://{source}", tmp_path, **options) as mount:
        is_right(mount.path / SHARDS[0], SHARDS[0], SIZE)
        is_right(mount.path / CONFIG, CONFIG, 777)
        assert sizes_in(tmp_path / "cache") == {777}
        assert SIZE in sizes_in(memory)
    assert not list(memory.iterdir())
    assert sizes_in(tmp_path / "cache") == {777}


def test_what_is_in_memory_outlives_a_killed_daemon(source: Path, memory: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "store": "off", "memory_dir": memory, "memory_size": "48MiB"}
    with mounted(f"file://{source}", tmp_path, **options) as mount:
        is_right(mount.path / SHARDS[0], SHARDS[0], SIZE)
        kill_daemon(mount)
        is_right(mount.path / SHARDS[0], SHARDS[0], SIZE)
        told = status(mount)
        assert told["process"]["restarts"] == 1
        assert told["bytes"]["origin"] == 0
    assert not list(memory.iterdir())


@pytest.mark.expected_log("holds 4 MiB and memory_size is 8 MiB")
def test_memory_that_is_not_there_is_one_clear_line(source: Path, tmp_path: Path) -> None:
    with (
        tmpfs(tmp_path / "little", 4) as little,
        pytest.raises(
            AssertionError, match=r"memory_dir .*little holds 4 MiB and memory_size is 8 MiB: lower"
        ),
        mounted(f"file://{source}", tmp_path, store="off", memory_dir=little, memory_size="8MiB"),
    ):
        pass
