"""s3fs-fuse, as Debian has it. Settings: its manual's advice for large objects and a local file cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.processes import mounting, program, run
from benchmarks.tools import Bucket

OPTIONS = ("ro", "parallel_count=16", "multipart_size=16", "stat_cache_expire=3600", "enable_noobj_cache")


class S3fs:
    """s3fs-fuse with a local cache."""

    name = "s3fs"

    def __init__(self, options: Sequence[str] = OPTIONS) -> None:
        self._options = tuple(options)

    def version(self) -> str:
        """Version, one line."""
        return run([program("s3fs"), "--version"], timeout=30).splitlines()[0]

    def settings(self) -> Sequence[str]:
        """Mount options."""
        return (*self._options, "use_cache")

    def prepare(self, bucket: Bucket, model: Path, work: Path) -> None:
        """Nothing: it reads plain objects."""

    @contextlib.contextmanager
    def mounted(self, bucket: Bucket, work: Path) -> Iterator[Path]:
        """Mount with s3fs and its cache of files; gives the mountpoint, unmounts at the end."""
        mountpoint = work / "mnt"
        cache = work / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        keys = work / "passwd"
        keys.touch(mode=0o600)
        keys.write_text(f"{bucket.access_key}:{bucket.secret_key}\n")
        options = (
            *self._options,
            f"use_cache={cache}",
            f"passwd_file={keys}",
            f"url={bucket.endpoint}",
            "use_path_request_style",
        )
        # The folder is not mounted as such: s3fs wants a directory object for that.
        command = [program("s3fs"), bucket.bucket, str(mountpoint), "-f", "-o", ",".join(options)]
        with mounting(command, mountpoint, work / "s3fs.log"):
            yield mountpoint / bucket.prefix
