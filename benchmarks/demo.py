"""The demo: an S3 server, a model in it, `fusecache mount`, and a loader that reads it cold and warm.

All of it runs on this machine below one temporary folder, which is gone at the end however the run ends.
The next run removes the folder that a killed one left behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.measure import drop_page_cache, interleave, median
from benchmarks.model import MIB, Model, make_model, sha256_of
from benchmarks.processes import (
    BenchmarkError,
    clean_environment,
    end_cleanly_on_signals,
    mounts_below,
    unmount,
    wait_until,
)
from benchmarks.readers import timed
from benchmarks.report import file_system_of
from benchmarks.tools import Bucket
from benchmarks.tools.fusecache import Fusecache, status, store_files
from benchmarks.tools.seaweedfs import s3_server, upload

PREFIX = "fusecache-demo."
ROUNDS = 3
COPIES = 3  # of the model at the worst moment: the source, the server's objects, the cache


@dataclass(frozen=True)
class Place:
    """A folder that can hold the demo's files."""

    folder: Path
    file_system: str
    free: int
    """Bytes."""

    @property
    def passthrough(self) -> bool:
        """Whether the kernel can serve files of this place itself: overlayfs is stacked already."""
        return self.file_system not in ("overlay", "fuse", "fuse.fusecache")


def candidates() -> Iterator[Place]:
    """Where the demo may keep its files, the best first."""
    seen = set()
    for folder in (Path(tempfile.gettempdir()), Path("/var/tmp"), Path("/dev/shm")):
        if folder not in seen and folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
            seen.add(folder)
            yield Place(folder, file_system_of(folder), shutil.disk_usage(folder).free)


def choose(places: Iterable[Place], needed: int) -> Place:
    """The first with room where passthrough works, else the first with room; raises BenchmarkError."""
    roomy = [place for place in places if place.free >= needed]
    if not roomy:
        raise BenchmarkError(
            f"no temporary folder has {needed >> 20} MiB to spare: set TMPDIR to one that has"
        )
    return next((place for place in roomy if place.passthrough), roomy[0])


@dataclass(frozen=True)
class Load:
    """One line of the table."""

    name: str
    seconds: float
    size: int
    mode: str
    source: str

    @property
    def speed(self) -> float:
        """GB/s."""
        return self.size / 1e9 / self.seconds


def bytes_by_source(before: Mapping[str, Any], after: Mapping[str, Any], read: int) -> str:
    """Where `read` bytes came from, by two answers of `fusecache status`.

    A byte that was fetched counts as fetched, also when its reader got it by way of the store; what neither
    was fetched nor went through the daemon was read by the kernel.
    """
    moved = {
        tier: int(after["bytes"][tier]) - int(before["bytes"][tier]) for tier in ("origin", "peer", "store")
    }
    left = read
    parts = []
    for tier, name in (("origin", "S3"), ("peer", "peers"), ("store", "local store")):
        part = min(left, max(0, moved[tier]))
        left -= part
        parts.append((part, name))
    parts.append((left, "local store, by the kernel"))
    # A loader skips parts of the headers, which the daemon fetches all the same: allow for them.
    return ", ".join(f"{round(100 * part / read)}% {name}" for part, name in parts if part > read // 100)


@dataclass(frozen=True)
class Result:
    """The findings of the demo: a line per load, and the mode of the mount with its reason."""

    loads: Sequence[Load]
    mode: str
    why: str


def opens_by_mode(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """How the files were opened between two answers of `fusecache status`."""
    opened = {
        mode: int(after["opens"][mode]) - int(before["opens"][mode]) for mode in ("passthrough", "daemon")
    }
    return " + ".join(mode for mode, number in opened.items() if number > 0) or str(after["mode"]["now"])


def remove_leftovers(folders: Iterable[Path]) -> list[Path]:
    """Unmount and delete what runs left that were killed; returns what it removed."""
    removed = []
    for folder in folders:
        for left in folder.glob(f"{PREFIX}*"):
            owner = left.name.removeprefix(PREFIX).partition(".")[0]
            if left.is_symlink() or left.lstat().st_uid != os.geteuid() or not owner.isdigit():
                continue
            if Path(f"/proc/{owner}").exists():
                continue
            for mountpoint in mounts_below(left):
                unmount(mountpoint)
            shutil.rmtree(left, ignore_errors=True)
            removed.append(left)
    return removed


@contextlib.contextmanager
def work_folder(place: Place) -> Iterator[Path]:
    """A private folder for the length of the block."""
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}.", dir=place.folder))
    try:
        yield folder
    finally:
        # Never into a mount that would not go away.
        if not mounts_below(folder):
            shutil.rmtree(folder, ignore_errors=True)


def check(mount: Path, model: Model) -> None:
    """Compare every byte with what was uploaded; raises BenchmarkError that names a wrong file."""
    found = sorted(path.name for path in mount.iterdir())
    if found != sorted(model.sha256):
        raise BenchmarkError(f"the mount shows {', '.join(found)}")
    for name, digest in model.sha256.items():
        if sha256_of(mount / name) != digest:
            raise BenchmarkError(f"wrong bytes in {name}")


def load_cold_and_warm(bucket: Bucket, model: Model, sizes: Sequence[int], work: Path, say: Say) -> Result:
    """Mount, load, check, load again beside the raw files of the store."""
    with Fusecache().mounted(bucket, work) as mount:
        say(f"fusecache mount {bucket.url} {mount}")
        files = [mount / name for name in model.shards]
        first = status(mount)
        say("loading it cold: safetensors safe_open, every tensor")
        cold = timed("safetensors", files)
        second = status(mount)
        say("checking every byte against what was uploaded")
        check(mount, model)

        def complete() -> bool:
            return int(status(mount)["cache"]["objects_complete"]) >= len(model.sha256)

        wait_until(complete, "the whole model in the cache", 60)
        raw = store_files(work, sizes)

        def before() -> None:
            drop_page_cache([*files, *raw])

        third = status(mount)
        say(f"loading it warm, {ROUNDS} times in turn with the raw files of the cache")
        times = interleave(
            {"mount": lambda: timed("safetensors", files), "raw": lambda: timed("safetensors", raw)},
            ROUNDS,
            before=before,
        )
        fourth = status(mount)
        check(mount, model)
        mode = fourth["mode"]
        size = model.size
        cold_from = bytes_by_source(first, second, size)
        warm_from = bytes_by_source(third, fourth, ROUNDS * size)
        warm, plain = median(times["mount"]), median(times["raw"])
        loads = [
            Load("cold, from S3", cold, size, opens_by_mode(first, second), cold_from),
            Load("warm, from the cache", warm, size, opens_by_mode(third, fourth), warm_from),
            Load("the cache's files, without a mount", plain, size, "-", "local disk"),
        ]
        return Result(loads, str(mode["now"]), str(mode.get("why") or ""))


class Say:
    """Prints one line per step, with the seconds since the start."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()

    def __call__(self, text: str) -> None:
        seconds = time.monotonic() - self._started
        self._console.print(f"[dim]{seconds:5.1f} s[/]  {text}", highlight=False, soft_wrap=True)


def show(result: Result, files: int, console: Console) -> None:
    """Print the table and what it means."""
    table = Table()
    for name in ("load", "seconds", "GB/s", "opened by", "bytes from"):
        table.add_column(name, justify="right" if name in ("seconds", "GB/s") else "left")
    for load in result.loads:
        table.add_row(load.name, f"{load.seconds:.2f}", f"{load.speed:.2f}", load.mode, load.source)
    console.print(table)
    _cold, warm, raw = result.loads
    console.print(f"mode: {result.mode}{f' ({result.why})' if result.why else ''}", highlight=False)
    console.print(f"warm is {warm.speed / raw.speed:.2f} times the speed of the raw files", highlight=False)
    console.print(f"every byte of {files} files is right (SHA-256, cold and warm)", highlight=False)


@click.command()
@click.option("--size", type=click.IntRange(1), default=128, show_default=True, help="MiB per shard.")
@click.option(
    "--shards", type=click.IntRange(1, 64), default=4, show_default=True, help="Shards of the model."
)
def main(size: int, shards: int) -> None:
    """Mount a model from an S3 server on this machine, load it cold and warm, check every byte."""
    end_cleanly_on_signals()
    clean_environment()
    console = Console()
    say = Say(console)
    try:
        places = list(candidates())
        for left in remove_leftovers(place.folder for place in places):
            say(f"removed {left}, which a killed run had left")
        place = choose(places, COPIES * size * shards * MIB + 256 * MIB)
        why = "" if place.passthrough else ": no passthrough on it, and no other folder has room (set TMPDIR)"
        say(f"server data and cache in {place.folder} ({place.file_system}{why})")
        with work_folder(place) as work:
            say(f"making a model: {shards} safetensors shards of {size} MiB, index, config")
            model = make_model(work / "source", shards=shards, shard_mib=size)
            sizes = [(model.directory / name).stat().st_size for name in model.shards]
            say("starting an S3 server (SeaweedFS)")
            with s3_server(work, "models") as bucket:
                say(f"uploading the model to {bucket.url}")
                upload(bucket, model.directory)
                shutil.rmtree(model.directory)
                result = load_cold_and_warm(bucket, model, sizes, work, say)
    except (BenchmarkError, OSError, subprocess.SubprocessError) as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        raise click.ClickException("interrupted; everything was stopped and removed") from None
    say("stopped and removed everything")
    show(result, len(model.sha256), console)


if __name__ == "__main__":
    main()
