"""Mounts that are launched from the test process, with a daemon of the test's choice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusecache.config.model import MountConfig, SourceConfig
from fusecache_mount.kernel.syscalls import wait_for_exit
from fusecache_mount.lifecycle import fuse_mount, launch
from fusecache_mount.lifecycle.keeper_files import find_keeper_by_connection
from fusecache_mount.lifecycle.keeper_protocol import KEEPER_MODULE

STANDIN = Path(__file__).with_name("standin.py")
_END = 20.0


def ended(pid: int) -> bool:
    """Wait until a process, child or not, has ended."""
    return wait_for_exit(pid, _END)


def is_keeper(pid: int) -> bool:
    """Whether this process is a keeper still."""
    try:
        return KEEPER_MODULE.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


@dataclass
class Kept:
    """A mountpoint below `work`, and what the stand-in daemons there were told."""

    work: Path
    mountpoint: Path = field(init=False)
    keepers: list[int] = field(default_factory=list)
    _aborts: list[int] = field(default_factory=list)
    """Open abort files: the number of a connection may be another mount's soon after the end of ours."""

    def __post_init__(self) -> None:
        self.mountpoint = self.work / "mnt"
        self.mountpoint.mkdir()
        self.mode("serve")

    @property
    def directory(self) -> Path:
        """The runtime directory of this mount."""
        (found,) = (self.work / "run").iterdir()
        return found

    def mode(self, mode: str) -> None:
        """How the next daemon behaves: see standin.py."""
        (self.work / "mode").write_text(mode)

    def config(self, **changes: Any) -> MountConfig:
        secret = {"access_key_id": "AKIDEXAMPLE", "secret_access_key": "mostly-secret"}
        return MountConfig.model_validate(
            {
                "sources": (SourceConfig.model_validate({"url": "s3://bucket/prefix", **secret}),),
                "mountpoint": self.mountpoint,
                "cache_dir": self.work / "cache",
                "runtime_dir": self.work / "run",
                **changes,
            }
        )

    def launch(self, config: MountConfig | None = None, **given: Any) -> int:
        """Mount; returns the pid of the keeper."""
        command = (sys.executable, str(STANDIN), str(self.work))
        given = {"ready_deadline": 20.0, "stop_deadline": 5.0, "backoff": 0.01} | given
        launch.launch_mount(config or self.config(), False, daemon_command=command, **given)
        connection = self.connection
        assert connection is not None
        with contextlib.suppress(OSError):
            self._aborts.append(os.open(f"/sys/fs/fuse/connections/{connection}/abort", os.O_WRONLY))
        pid = find_keeper_by_connection(connection)
        assert pid is not None
        self.keepers.append(pid)
        return pid

    @property
    def connection(self) -> int | None:
        device = fuse_mount.device_number_of(self.mountpoint)
        return None if device is None else fuse_mount.connection_number(device)

    @property
    def told(self) -> list[dict[str, Any]]:
        """The start message of each daemon, with its "pid"."""
        return [json.loads(line) for line in (self.work / "told").read_text().splitlines()]

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Send a signal and wait for the end."""
        os.kill(pid, number)
        assert ended(pid)

    def log(self) -> str:
        return (self.directory / "log").read_text()

    def clean(self) -> None:
        """Leave no mount, no keeper and no waiting process, also after a failure."""
        for fd in self._aborts:
            with contextlib.suppress(OSError):
                os.write(fd, b"1")
            os.close(fd)
        if self.connection is not None:
            fuse_mount.abort_connection(self.connection)
            left = find_keeper_by_connection(self.connection)
            self.keepers += [left] if left is not None else []
        for pid in self.keepers:
            if is_keeper(pid):
                self.kill(pid)
        while self.connection is not None:
            fuse_mount.unmount(self.mountpoint, lazy=True, force=True)


@contextlib.contextmanager
def kept(work: Path) -> Iterator[Kept]:
    """A Kept that is cleaned up at the end."""
    made = Kept(work)
    try:
        yield made
    finally:
        made.clean()
