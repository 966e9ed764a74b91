"""Folders that are uploaded to a bucket and read on a mount, cold and warm."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.live import HANG, asked, cached
from tests.support.mounting import RealMount, mounted, s3_environment
from tests.support.servers import S3Bucket, wait_until

MODES: dict[str, dict[str, object]] = {"kernel": {}, "daemon": {"passthrough": "off", "open_wait": 0}}
"""All defaults: the kernel reads whole files; and all through the daemon, cold files while they are fetched."""


@dataclass(frozen=True)
class Figures:
    """Of a mount, since it was made: bytes that came from the origin, opens by who answers their reads."""

    origin: int
    passthrough: int
    daemon: int


class Library:
    """A prefix of a bucket, mounted."""

    def __init__(self, mount: RealMount, bucket: S3Bucket, prefix: str) -> None:
        self.mount = mount
        self.bucket = bucket
        self.prefix = prefix

    def serve(self, name: str, local: Path) -> Path:
        """Upload a folder, as tools that follow symbolic links do; the folder on the mount, not read yet."""
        for file in sorted(local.rglob("*")):
            if file.is_file():
                self.bucket.put(f"{self.prefix}/{name}/{file.relative_to(local)}", file.read_bytes())
        return self.shown(name)

    def shown(self, name: str) -> Path:
        """The uploaded folder, on the mount."""
        asked(self.mount, "refresh")
        path = self.mount.path / name
        assert path.exists()
        return path

    def figures(self) -> Figures:
        """As of now."""
        found = asked(self.mount, "status")
        opens = found["opens"]
        return Figures(found["bytes"]["origin"], opens["passthrough"], opens["daemon"])

    def cold_and_warm(self, folder: Path, load: Callable[[str], Any]) -> tuple[Any, Any]:
        """The results of `load` the first time and the second time.

        The first time every byte that is wanted comes from the origin, once; the second time none does, and where
        the kernel can read files by itself, it reads all of them.
        """
        assert not any(map(cached, _files(folder))), "it is not cold"
        before = self.figures()
        cold = load(str(folder))
        wait_until(
            lambda: all(cached(file) in (0, _size(file)) for file in _files(folder)), "whole files", HANG
        )
        between = self.figures()
        kept = sum(map(cached, _files(folder)))
        assert kept > 0, "nothing was read"
        assert between.origin - before.origin == kept, "bytes came twice, or were not kept"
        warm = load(str(folder))
        after = self.figures()
        assert after.origin == between.origin, "a warm load asked the origin"
        if asked(self.mount, "status")["mode"]["now"] == "passthrough":
            assert after.daemon == between.daemon, "a warm file is read through the daemon"
            assert after.passthrough > between.passthrough
        return cold, warm


class Mounts:
    """One mount per way of reading, made when it is first asked for."""

    def __init__(self, bucket: S3Bucket, work: Path, stack: contextlib.ExitStack) -> None:
        self._bucket = bucket
        self._work = work
        self._stack = stack
        self._made: dict[str, Library] = {}

    def __getitem__(self, mode: str) -> Library:
        """`MODES` has the names."""
        if mode not in self._made:
            work = self._work / mode
            work.mkdir()
            self._bucket.put(f"engines-{mode}/there", b"")
            mount = mounted(
                f"{self._bucket.url}/engines-{mode}",
                work,
                env=s3_environment(self._bucket.server),
                **MODES[mode],
            )
            self._made[mode] = Library(self._stack.enter_context(mount), self._bucket, f"engines-{mode}")
        return self._made[mode]


def _files(folder: Path) -> list[Path]:
    return [folder] if folder.is_file() else [file for file in folder.rglob("*") if file.is_file()]


def _size(file: Path) -> int:
    return file.stat().st_size
