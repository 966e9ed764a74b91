"""fusecache itself, as a user runs it: the command line, with its defaults."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.processes import BenchmarkError, program, run, unmount, wait_until
from benchmarks.tools import Bucket


class Fusecache:
    """`fusecache mount` with a cache below the work folder."""

    def __init__(self, name: str = "fusecache", options: Sequence[str] = ()) -> None:
        self.name = name
        self._options = tuple(options)

    def version(self) -> str:
        """Version, one line."""
        return run([program("fusecache"), "--version"], timeout=60).strip()

    def settings(self) -> Sequence[str]:
        """Mount options that are not the defaults."""
        return self._options

    def prepare(self, bucket: Bucket, model: Path, work: Path) -> None:
        """Nothing: it reads plain objects."""

    @contextlib.contextmanager
    def mounted(self, bucket: Bucket, work: Path) -> Iterator[Path]:
        """Mount with the command `fusecache mount`; gives the mountpoint, unmounts at the end."""
        mountpoint = work / "mnt"
        mountpoint.mkdir(parents=True, exist_ok=True)
        options = ",".join((*self._options, f"endpoint_url={bucket.endpoint}", f"cache_dir={work / 'cache'}"))
        command = [program("fusecache"), "mount", bucket.url, str(mountpoint), "-o", options]
        pid = 0
        try:
            run(command, timeout=60, env=bucket.environment)
            pid = int(status(mountpoint)["process"]["pid"])
            yield mountpoint
        finally:
            with contextlib.suppress(BenchmarkError):
                run([program("fusecache"), "umount", str(mountpoint)], timeout=60)
            unmount(mountpoint)
            if pid:
                end(pid)


def status(mountpoint: Path) -> dict[str, Any]:
    """The answer of `fusecache status --json` for this mount."""
    found = json.loads(run([program("fusecache"), "status", str(mountpoint), "--json"], timeout=30))
    if isinstance(found, list):
        found = found[0]
    return dict(found)


def store_files(work: Path, sizes: Sequence[int]) -> list[Path]:
    """The store's files that hold whole objects of these sizes; raises BenchmarkError if one is missing."""
    found = [path for path in sorted((work / "cache").rglob("*")) if path.is_file()]
    files: list[Path] = []
    for size in sizes:
        match = next((f for f in found if f not in files and f.stat().st_size == size), None)
        if match is None:
            raise BenchmarkError(f"no file of {size} bytes in {work / 'cache'}")
        files.append(match)
    return files


def end(pid: int) -> None:
    """Wait for the daemon to be gone, and kill it if it is not within 15 seconds."""

    def gone() -> bool:
        return not Path(f"/proc/{pid}").exists()

    try:
        wait_until(gone, f"the end of the daemon {pid}", 15)
    except BenchmarkError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
