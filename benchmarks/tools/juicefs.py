"""JuiceFS with its metadata in SQLite and its blocks in a bucket of the same server.

Settings: its guides on large-file sequential reads (a big buffer, deep read-ahead, 1 MiB FUSE requests) and
on cached reads (no checksums of the cache). Its objects are its own format: the model is copied in first.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.processes import free_port, mounting, program, run
from benchmarks.tools import Bucket
from benchmarks.tools.s5cmd import S5cmd

OPTIONS = (
    "--buffer-size=1024M",
    "--max-readahead=256",
    "--prefetch=8",
    "--max-fuse-io=1M",
    "--cache-size=100G",
    "--free-space-ratio=0.01",
    "--verify-cache-checksum=none",
    "--cache-eviction=none",
    "--open-cache=1h",
    "--attr-cache=1h",
    "--entry-cache=1h",
    "--dir-entry-cache=1h",
    "--read-only",
)


class JuiceFS:
    """JuiceFS community edition."""

    name = "juicefs"

    def __init__(self, options: Sequence[str] = OPTIONS) -> None:
        self._options = tuple(options)
        self._meta = ""

    def version(self) -> str:
        """Version, one line."""
        return run([program("juicefs"), "version"], timeout=30).strip()

    def settings(self) -> Sequence[str]:
        """Mount options."""
        return self._options

    def prepare(self, bucket: Bucket, model: Path, work: Path) -> None:
        """Format a volume and copy the model into it."""
        home = work / "juicefs"
        home.mkdir()
        self._meta = f"sqlite3://{home / 'meta.db'}"
        volume = Bucket(bucket.endpoint, bucket.access_key, bucket.secret_key, "juicefs", "")
        S5cmd().make_bucket(volume)
        keys = {"ACCESS_KEY": bucket.access_key, "SECRET_KEY": bucket.secret_key}
        command = [
            program("juicefs"),
            "format",
            self._meta,
            "benchmark",
            "--storage=s3",
            f"--bucket={bucket.endpoint}/juicefs",
            "--trash-days=0",
        ]
        run(command, timeout=60, env=keys)
        mountpoint = home / "mnt"
        writing = ("--buffer-size=1024M", "--cache-size=0", "--no-bgjob", "--backup-meta=0")
        with mounting(self._command(mountpoint, home / "cache", writing), mountpoint, home / "juicefs.log"):
            shutil.copytree(model, mountpoint / bucket.prefix)

    @contextlib.contextmanager
    def mounted(self, bucket: Bucket, work: Path) -> Iterator[Path]:
        """Mount JuiceFS, with its metadata in a local database; gives the mountpoint, unmounts at the end."""
        mountpoint = work / "mnt"
        options = (*self._options, "--no-bgjob", "--backup-meta=0")
        with mounting(self._command(mountpoint, work / "cache", options), mountpoint, work / "juicefs.log"):
            yield mountpoint / bucket.prefix

    def _command(self, mountpoint: Path, cache: Path, options: Sequence[str]) -> list[str]:
        return [
            program("juicefs"),
            "mount",
            self._meta,
            str(mountpoint),
            f"--cache-dir={cache}",
            *options,
            f"--metrics=127.0.0.1:{free_port()}",
            "--no-usage-report",
            "--no-syslog",
        ]
