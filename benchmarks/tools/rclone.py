"""rclone mount. Settings: its documentation of --vfs-read-chunk-streams for high-throughput object stores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.processes import mounting, program, run
from benchmarks.tools import Bucket

OPTIONS = (
    "--vfs-cache-mode=full",
    "--vfs-read-chunk-streams=16",
    "--vfs-read-chunk-size=4M",
    "--vfs-read-ahead=256M",
    "--buffer-size=0",
    "--max-read-ahead=1M",
    "--vfs-fast-fingerprint",
    "--no-modtime",
    "--no-checksum",
    "--dir-cache-time=1h",
    "--attr-timeout=1h",
    "--read-only",
)


class Rclone:
    """rclone mount with a full VFS cache."""

    name = "rclone"

    def __init__(self, options: Sequence[str] = OPTIONS) -> None:
        self._options = tuple(options)

    def version(self) -> str:
        """Version, one line."""
        return run([program("rclone"), "version"], timeout=30).splitlines()[0]

    def settings(self) -> Sequence[str]:
        """Mount options."""
        return self._options

    def prepare(self, bucket: Bucket, model: Path, work: Path) -> None:
        """Nothing: it reads plain objects."""

    @contextlib.contextmanager
    def mounted(self, bucket: Bucket, work: Path) -> Iterator[Path]:
        """Run `rclone mount` with its cache of files; gives the mountpoint, unmounts at the end."""
        mountpoint = work / "mnt"
        config = work / "rclone.conf"
        config.touch()
        command = [
            program("rclone"),
            "mount",
            f":s3:{bucket.bucket}/{bucket.prefix}",
            str(mountpoint),
            f"--config={config}",
            f"--cache-dir={work / 'cache'}",
            *self._options,
        ]
        environment = {
            **bucket.environment,
            "RCLONE_S3_PROVIDER": "SeaweedFS",
            "RCLONE_S3_ENV_AUTH": "true",
            "RCLONE_S3_ENDPOINT": bucket.endpoint,
        }
        with mounting(command, mountpoint, work / "rclone.log", environment):
            yield mountpoint
