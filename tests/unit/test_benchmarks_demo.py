"""The demo's decisions: where its files go, what it says about sources, what it removes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.demo import (
    PREFIX,
    Load,
    Place,
    Result,
    bytes_by_source,
    check,
    choose,
    opens_by_mode,
    remove_leftovers,
    show,
    work_folder,
)
from benchmarks.model import make_model
from benchmarks.processes import BenchmarkError

DISK = Place(Path("/a"), "ext4", 1000)
OVERLAY = Place(Path("/b"), "overlay", 1000)
MEMORY = Place(Path("/c"), "tmpfs", 500)


@pytest.mark.parametrize(
    ("places", "needed", "chosen"),
    [
        ([DISK, MEMORY], 400, DISK),
        ([OVERLAY, MEMORY], 400, MEMORY),
        ([OVERLAY, MEMORY], 600, OVERLAY),
        ([MEMORY, DISK], 600, DISK),
    ],
)
def test_a_place_with_room_and_passthrough_comes_first(
    places: list[Place], needed: int, chosen: Place
) -> None:
    assert choose(places, needed) is chosen


def test_no_room_anywhere() -> None:
    with pytest.raises(BenchmarkError, match="TMPDIR"):
        choose([DISK, OVERLAY], 2000)


def _status(store: int, peer: int, origin: int, passthrough: int = 0, daemon: int = 0) -> dict[str, object]:
    return {
        "bytes": {"store": store, "peer": peer, "origin": origin},
        "opens": {"passthrough": passthrough, "daemon": daemon},
        "mode": {"now": "passthrough", "why": ""},
    }


def test_sources_of_the_bytes() -> None:
    nothing = _status(10, 0, 20)
    assert bytes_by_source(nothing, _status(10, 0, 1020), 1000) == "100% S3"
    assert bytes_by_source(nothing, _status(260, 0, 770), 1000) == "75% S3, 25% local store"
    assert bytes_by_source(nothing, _status(900, 100, 520), 1000) == "50% S3, 10% peers, 40% local store"
    assert (
        bytes_by_source(nothing, _status(410, 0, 20), 1000)
        == "40% local store, 60% local store, by the kernel"
    )
    assert bytes_by_source(nothing, nothing, 1000) == "100% local store, by the kernel"
    assert bytes_by_source(nothing, _status(10, 0, 1220), 1000) == "100% S3"


def test_modes_of_the_opens() -> None:
    nothing = _status(0, 0, 0, 3, 4)
    assert opens_by_mode(nothing, _status(0, 0, 0, 3, 5)) == "daemon"
    assert opens_by_mode(nothing, _status(0, 0, 0, 4, 5)) == "passthrough + daemon"
    assert opens_by_mode(nothing, nothing) == "passthrough"


def test_folders_of_dead_runs_are_removed_and_no_others(tmp_path: Path) -> None:
    done = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True)
    dead = tmp_path / f"{PREFIX}{done.stdout.strip()}.abc"
    (dead / "cache").mkdir(parents=True)
    kept = [tmp_path / f"{PREFIX}{os.getpid()}.abc", tmp_path / f"{PREFIX}notes", tmp_path / "other"]
    for folder in kept:
        folder.mkdir()
    link = tmp_path / f"{PREFIX}{done.stdout.strip()}.link"
    link.symlink_to(kept[2])
    assert remove_leftovers([tmp_path]) == [dead]
    assert sorted(tmp_path.iterdir()) == sorted([*kept, link])


def test_the_work_folder_goes_with_the_block(tmp_path: Path) -> None:
    def fail() -> None:
        with work_folder(Place(tmp_path, "ext4", 0)) as work:
            assert work.stat().st_mode & 0o777 == 0o700
            (work / "file").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_one_wrong_byte_is_found(tmp_path: Path) -> None:
    model = make_model(tmp_path, shards=2, shard_mib=1)
    check(tmp_path, model)
    with (tmp_path / model.shards[1]).open("r+b") as file:
        file.seek(500_000)
        byte = file.read(1)
        file.seek(500_000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(BenchmarkError, match=model.shards[1]):
        check(tmp_path, model)
    (tmp_path / "config.json").unlink()
    with pytest.raises(BenchmarkError, match="the mount shows"):
        check(tmp_path, model)


def test_the_table_says_what_was_found() -> None:
    loads = [
        Load("cold", 2.0, 10**9, "daemon", "100% S3"),
        Load("warm", 0.5, 10**9, "passthrough", "100% local store, by the kernel"),
        Load("raw", 0.4, 10**9, "-", "local disk"),
    ]
    console = Console(width=120, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    show(Result(loads, "passthrough", "kernel 6.12"), 6, console)
    text = console.export_text()
    assert "mode: passthrough (kernel 6.12)" in text
    assert "warm is 0.80 times the speed of the raw files" in text
    assert "every byte of 6 files is right" in text
